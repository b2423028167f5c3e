"""The vision cache: one encoding a picture, a byte budget, files that outlive the run, and no stale features."""

import pytest
import torch
from torch import nn

from r1v2_fast.models.feature_cache import FeatureCache, fingerprint

PICTURES = {name: torch.full((1, 3, 4, 4), float(i)) for i, name in enumerate("abc")} | {
    "copy of a": torch.zeros(1, 3, 4, 4)
}


class Encoder:
    """A tower whose features are the pixels times its weight, with a list of what it was asked for."""

    def __init__(self, weight=2.0):
        self.tower = nn.Linear(1, 1)
        with torch.no_grad():
            self.tower.weight.fill_(weight)
            self.tower.bias.zero_()
        self.asked = []

    def __call__(self, keys):
        self.asked.append(keys)
        return [PICTURES[key].flatten(2)[:, :2] * self.tower.weight.item() + 1 for key in keys]


def get(cache, encoder, *keys):
    return cache.get(list(keys), lambda names: [PICTURES[n] for n in names], encoder, encoder.tower)


def test_a_picture_is_encoded_once_whatever_its_keys():
    cache, encoder = FeatureCache(), Encoder()
    first = get(cache, encoder, "a", "b", "a", "copy of a")
    again = get(cache, encoder, "copy of a", "b")
    assert encoder.asked == [["a", "b"]]
    assert len(cache) == 2 and torch.equal(first[0], first[3]) and torch.equal(again[0], first[0])
    assert torch.equal(again[1], first[1]) and not torch.equal(first[0], first[1])


def test_the_least_recently_used_leaves_when_the_budget_is_spent():
    size = Encoder()(["a"])[0].nbytes
    cache, encoder = FeatureCache(max_bytes=2 * size), Encoder()
    get(cache, encoder, "a")
    get(cache, encoder, "b")
    get(cache, encoder, "a")
    get(cache, encoder, "c")
    assert cache.bytes == 2 * size and len(cache) == 2
    get(cache, encoder, "a")
    get(cache, encoder, "b")
    assert encoder.asked == [["a"], ["b"], ["c"], ["b"]]


def test_files_serve_a_later_run_bit_for_bit(tmp_path):
    first = get(FeatureCache(folder=tmp_path), Encoder(), "a", "b")
    later = Encoder()
    again = get(FeatureCache(folder=tmp_path), later, "b", "a")
    assert later.asked == [] and torch.equal(again[0], first[1]) and torch.equal(again[1], first[0])
    assert not list(tmp_path.rglob("*.partial"))


def test_files_of_another_tower_are_not_its_own(tmp_path):
    get(FeatureCache(folder=tmp_path), Encoder(2.0), "a")
    other = Encoder(3.0)
    get(FeatureCache(folder=tmp_path), other, "a")
    assert other.asked == [["a"]]


def test_files_of_the_same_weights_under_other_settings_are_not_its_own(tmp_path):
    folder = FeatureCache(folder=tmp_path).folder
    for settings, expected in (("layer -1", [["a"]]), ("layer -2", [["a"]]), ("layer -1", [])):
        encoder = Encoder()
        load = lambda names: [PICTURES[n] for n in names]  # noqa: E731
        FeatureCache(folder=folder).get(["a"], load, encoder, encoder.tower, lambda: settings)  # noqa: B023
        assert encoder.asked == expected


def test_a_tower_that_changed_is_asked_again(tmp_path):
    cache, encoder = FeatureCache(folder=tmp_path), Encoder()
    before = get(cache, encoder, "b")[0]
    with torch.no_grad():
        encoder.tower.weight.mul_(2)
    cache.clear()
    assert cache.bytes == 0 and not torch.equal(get(cache, encoder, "b")[0], before) and len(encoder.asked) == 2


@pytest.mark.parametrize("content", [b"", b"not a tensor file", None])
def test_a_broken_file_is_written_anew(tmp_path, content):
    wanted = get(FeatureCache(folder=tmp_path), Encoder(), "a")[0]
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-3] if content is None else content)
    encoder = Encoder()
    assert torch.equal(get(FeatureCache(folder=tmp_path), encoder, "a")[0], wanted) and encoder.asked == [["a"]]
    assert torch.equal(get(FeatureCache(folder=tmp_path), Encoder(), "a")[0], wanted)


def test_a_full_disk_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="make room, or set model.feature_cache_folder=null"):
        get(FeatureCache(folder=tmp_path / "file"), Encoder(), "a")


def test_a_fingerprint_sees_one_bit_and_a_swap():
    tower = nn.Linear(64, 64)
    seen = {fingerprint(tower)}
    with torch.no_grad():
        tower.weight[3, 5] = torch.nextafter(tower.weight[3, 5], torch.tensor(9.0))
        seen.add(fingerprint(tower))
        tower.weight[[0, 1]] = tower.weight[[1, 0]]
        seen.add(fingerprint(tower))
    seen |= {fingerprint(tower.bfloat16()), fingerprint(tower.double())}
    assert len(seen) == 5

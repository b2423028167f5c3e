"""A toy that has opinions, its untrained weights scaled until answers depend on prompt and picture; and a server of it."""

import base64
import copy
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from r1v2_fast import config
from r1v2_fast.log import Log
from r1v2_fast.rollout.engine import Prompt
from r1v2_fast.rollout.sampling import pick, uniforms
from r1v2_fast.train.context import Context


def sharpen(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(5.0 if "language_model" in name or "lm_head" in name else 2.0)


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    sizes = "data.sizes={align: 16, policy: 16, reward: 16, heldout: 16}"
    recipe = config.load("digits", [f"run.folder={folder}", sizes])
    context = Context(recipe, folder, Log(folder))
    loaded = context.initial()
    sharpen(loaded.model)
    context.use(loaded)
    context.policy.train_parts(["adapter"])
    return context


@pytest.fixture(scope="module")
def prompts(context):
    """Of unequal lengths, with one picture, none and two."""
    dataset = context.corpus.dataset("policy.parquet")
    found = context.reader.prompts(dataset, dataset.records[:6])
    words = context.policy.tokenizer("Read the digits.", add_special_tokens=False)["input_ids"]
    text = Prompt("text", [*words, *words[:2]], [])
    two = Prompt("two pictures", found[0].ids + found[1].ids, found[0].image_keys + found[1].image_keys)
    assert len({len(prompt.ids) for prompt in [*found, text, two]}) >= 4
    return [found[0], text, *found[1:4], two, *found[4:]]


class FakeVLLM(ThreadingHTTPServer):
    """The parts of a vLLM server that a rollout uses, over a copy of a policy's language model, on a real socket.

    before  called with (handler, number of the request) ahead of an answer; True says it has answered
    alter   changes a completion's reply before it goes out
    """

    def __init__(self, policy, *, mode="processed_logprobs", version="0.13.0", key=None, names=("toy",)):
        super().__init__(("127.0.0.1", 0), Handler)
        self.language_model = copy.deepcopy(policy.internvl.language_model)
        self.head = copy.deepcopy(policy.head)
        self.mode, self.version, self.key, self.names = mode, version, key, names
        self.before = lambda handler, number: False
        self.alter = lambda reply: reply
        self.asked = []  # bodies of completions
        self.paths = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # a client that went away

    @torch.no_grad()
    def completion(self, body):
        """vLLM's order: raw log-probs, logit_bias, temperature, processed log-probs."""
        prompt = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"], validate=True)), weights_only=True)
        assert prompt.ndim == 2 and prompt.dtype == self.language_model.dtype
        noise = uniforms([body["seed"] or 0], body["n"], body["max_tokens"])
        bias = torch.zeros(self.head.weight.shape[0])
        for token, value in body.get("logit_bias", {}).items():
            bias[int(token)] = max(-100.0, min(100.0, value))
        choices = []
        for index in range(body["n"]):
            ids, logprobs, reason = [], [], "length"
            for step in range(body["max_tokens"]):
                own = self.language_model.embed_tokens(torch.tensor(ids, dtype=torch.int64))
                hidden = self.language_model(inputs_embeds=torch.cat([prompt, own])[None]).last_hidden_state[:, -1]
                logits = self.head(hidden).float()
                token, logprob = pick(logits + bias, body["temperature"], noise[index : index + 1, step])
                if self.mode == "raw_logprobs":
                    logprob = logits.log_softmax(1)[0, token]
                ids.append(token.item())
                logprobs.append(logprob.item())
                if ids[-1] in body["stop_token_ids"]:
                    reason = "stop"
                    break
            choice = {"index": index, "text": "", "finish_reason": reason, "token_ids": ids}
            choices.append({**choice, "logprobs": {"token_logprobs": logprobs}})
        return {"object": "text_completion", "model": body["model"], "choices": choices}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, content):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.server.paths.append(self.path)
        if self.path == "/version":
            self.answer(200, {"version": self.server.version})
        elif self.allowed():
            self.answer(200, {"data": [{"id": name} for name in self.server.names]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.paths.append(self.path)
        if self.path != "/v1/completions":
            self.answer(404, {"detail": "Not Found"})
        elif self.allowed():
            self.server.asked.append(body)
            if not self.server.before(self, len(self.server.asked)):
                self.answer(200, self.server.alter(self.server.completion(body)))

    def allowed(self):
        if self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}":
            return True
        self.answer(401, {"error": "Unauthorized"})
        return False


@pytest.fixture
def serve(context):
    """serve(**options): a running `FakeVLLM` over the context's policy, or over another."""
    servers = []

    def start(policy=None, **options):
        server = FakeVLLM(policy or context.policy, **options)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()

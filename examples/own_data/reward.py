"""A reward of your own: one function, named in recipe.yaml as `examples/own_data/reward.py:close`."""


def close(prompts, completions, *, answer, **columns):
    """1 for the right answer, 0.5 for a number next to it, 0 for anything else.

    One call scores many responses, and every argument is a list with one entry a response:

    prompts       what the model was asked
    completions   what it wrote, such as "<think>4 5</think>9"
    answer        the `answer` of the record it was asked about
    columns       the records' further columns by name, here `response`; ask for one as you ask for `answer`
    returns       a number a response, the higher the better; None where you cannot tell
    """
    rewards = []
    for completion, right in zip(completions, answer, strict=True):
        said = completion.split("</think>")[-1].strip()
        if said == right:
            rewards.append(1.0)
        elif said.isdecimal() and abs(int(said) - int(right)) == 1:
            rewards.append(0.5)
        else:
            rewards.append(0.0)
    return rewards

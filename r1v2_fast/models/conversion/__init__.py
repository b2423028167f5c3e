"""Checkpoints between the layout InternVL and Skywork publish (`internvl_chat`) and transformers' InternVL.

`names` says which tensor is which, `plan` what every output tensor is made of, `checkpoint`, `safetensors_file` and
`pickles` read, `shards` writes, `config`, `tokenizer`, `template` and `images` convert what lies beside the weights.
No code of a checkpoint runs.
"""

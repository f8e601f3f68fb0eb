"""GPT-2 with attn_implementation="fastigpt": the tokens of "sdpa", through torch.ops.fastigpt.

    python examples/gpt2_attention.py                  # random weights
    python examples/gpt2_attention.py --model gpt2     # OpenAI's, from the hub or its local cache

Needs transformers.
"""

from __future__ import annotations

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fastigpt.integrations.attention import register


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory or hub id; default: GPT-2's shape with random weights")
    parser.add_argument("--layers", type=int, default=12, help="of the random model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()

    torch.manual_seed(0)
    model = (
        GPT2LMHeadModel.from_pretrained(given.model)
        if given.model
        else GPT2LMHeadModel(GPT2Config(n_layer=given.layers))
    )
    model = model.eval().to(given.device)
    prompt = torch.randint(0, model.config.vocab_size, (2, 24), device=given.device)
    call = {"max_new_tokens": given.tokens, "do_sample": False, "attention_mask": torch.ones_like(prompt)}

    model.set_attn_implementation("sdpa")
    expected = model.generate(prompt, **call, pad_token_id=0, eos_token_id=None)
    register()
    model.set_attn_implementation("fastigpt")
    found = model.generate(prompt, **call, pad_token_id=0, eos_token_id=None)
    if not torch.equal(found, expected):
        raise SystemExit(f"tokens differ: {float((found == expected).float().mean()):.1%} are the same")
    print(f"{found[:, prompt.shape[1] :].numel()} tokens, all the same as with sdpa")


if __name__ == "__main__":
    main()

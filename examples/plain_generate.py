"""A fused prompt in plain transformers: `prompt.past_key_values` is a `Cache`, and `model.generate` takes it.

`fuse` has the next-token logits already. `generate` wants at least one token that is not in the cache: give it the prompt's ids
and the first token of the answer, and it goes on from there without running the prompt again. `assistant_model=` and
`prompt_lookup_num_tokens=` are for `engine.generate`: transformers would run the prompt again for them, and is refused.

    python examples/plain_generate.py
"""

import torch

from ragkv import Engine, PromptTemplate, bundled


def main() -> None:
    """Answer one question twice: with `model.generate` and with `engine.generate`."""
    known = bundled.questions()[0]
    parts = bundled.documents()[known.documents[0]].strip().split("\n\n")
    model, tokenizer = bundled.load()
    with Engine(model, tokenizer, template=PromptTemplate(**bundled.TEMPLATE)) as engine:
        chunks = engine.add_document(parts)

        prompt = engine.fuse(chunks, known.question)
        first_token = prompt.logits.argmax(-1, keepdim=True)
        ids = torch.cat([prompt.input_ids, first_token], dim=1)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=prompt.past_key_values,
            max_new_tokens=23,
            do_sample=False,
        )
        plain = tokenizer.decode(out[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)

        answer = engine.generate(chunks, known.question, max_new_tokens=24)

    print(f"{known.question}\nmodel.generate:  {plain.strip()}\nengine.generate: {answer.text.strip()}")


if __name__ == "__main__":
    main()

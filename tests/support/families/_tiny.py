"""Code shared by the tiny families: a byte tokenizer, a chat template and random weights with clear attention."""

from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AddedToken, PreTrainedModel, Qwen2Tokenizer

DEPTH = 8
TEXT: dict[str, Any] = {  # a decoder's dimensions
    "bos_token_id": None,
    "eos_token_id": None,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
TEMPLATE = (  # a chat template of the form that all of these models use
    "{%% for message in messages %%}<|im_start|>{{ message['role'] }}\n"
    "{%% if message['content'] is string %%}{{ message['content'] }}{%% else %%}"
    "{%% for part in message['content'] %%}"
    "{%% if part['type'] == 'video' %%}%(video)s{%% elif part['type'] == 'audio' %%}%(audio)s"
    "{%% elif part['type'] == 'image' %%}%(image)s{%% else %%}{{ part['text'] }}{%% endif %%}"
    "{%% endfor %%}{%% endif %%}<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)


def template(*, video: str = "", audio: str = "", image: str = "") -> str:
    """A chat template with these placeholders for media."""
    return TEMPLATE % {"video": video, "audio": audio, "image": image}


def byte_tokenizer(*special: str, **named: str) -> Qwen2Tokenizer:
    """A tokenizer of 256 bytes, then `<|endoftext|>`, `<|im_start|>`, `<|im_end|>` and these special tokens.

    named: attributes such as `image_token`, whose values are special tokens too.
    """
    words = dict.fromkeys(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special, *named.values()])
    vocab = {letter: number for number, letter in enumerate([*sorted(ByteLevel.alphabet()), *words])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=named)
    tokenizer.add_tokens([AddedToken(word, special=True) for word in words], special_tokens=True)
    return tokenizer


def randomized(model: PreTrainedModel, attention: str, *, scale: float = 0.25, seed: int = 0) -> PreTrainedModel:
    """The model with random weights whose attention is far from uniform, so that scores differ clearly."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(0, scale if parameter.ndim == 2 else 0.1)
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            parameter.data.fill_(1.0)
    settings: Any = model.generation_config
    settings.eos_token_id = settings.bos_token_id = None
    settings.pad_token_id = 0
    model.set_attn_implementation(attention)
    return model.eval()

"""Write a tiny GGUF with random weights that llama.cpp serves: llama architecture, SPM tokenizer, ChatML template.

    cd scripts && python -m llama.make_gguf tiny.gguf [--layers 2 --embd 64 ...]

Random weights would babble bytes without end. So dimension 0 of the residual stream is kept constant (every embedding
has it, no layer writes to it), and column 0 of the output matrix thereby is a bias for each token: whole words are
sampled, bytes and control tokens never, and the end of the turn comes with a chosen probability.

The same model makes the same bytes, and with a `seed` in the request two servers give the same answer.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum, auto
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, LlamaFileType, TokenType
from numpy.typing import NDArray

from llama import Model

HEAD_SIZE = 32  # the smallest that llama.cpp's kernels like; `embd` has to be a multiple of it
NEVER_BIAS = -60.0  # e^-60: not sampled within the age of the universe
STD = 1.0  # of a word's logit
POOLING_RANK = 4  # llama.cpp's LLAMA_POOLING_TYPE_RANK

# Enough plain words for answers that read as text, and a few that take more than one byte in UTF-8.
_TEXT = """the of and to in a is that it for was on are as with his they at be this from have or by one had not but
what all were when we there can an your which their said if do will each about how up out them then she many some so
these would other into has more her two like him see time could no make than first been its who now people my made over
good new write our me man too any day same right look think also around another came come work three word must because
does part even place well such here take why help put different away again off went old number great tell men say small
next sound below saw something both few those always looked show large often asked house world going together thought
want school important until form food keep children feet land side without boy once animals life enough took sometimes
café naïve 日本 🙂"""
WORDS = _TEXT.split()

# ChatML, with thoughts, tools and tool calls in the tags that llama.cpp's parser finds by itself.
TEMPLATE = r"""
{%- if tools %}{{ '<|im_start|>system\n<tools>' }}{% for t in tools %}{{ '\n' + (t | tojson) }}{% endfor %}
{{- '\n</tools>\nTo call one: <tool_call>{"name": ..., "arguments": {...}}</tool_call><|im_end|>\n' }}{% endif %}
{%- for m in messages %}{% if m.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}{% else %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}
{%- if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}{{ '<tool_call>{"name": "' +
c.function.name + '", "arguments": ' + (c.function.arguments | tojson) + '}</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking %}{{ '<think>\n' }}{% endif %}{% endif %}"""


class Part(Enum):
    """What a token is to the sampler: each part has one bias, and words and characters vary around theirs."""

    WORD = auto()
    CHARACTER = auto()
    NEWLINE = auto()
    QUOTE = auto()
    JSON = auto()
    END = auto()
    THOUGHT_END = auto()
    TOOL_CALL = auto()
    NEVER = auto()


@dataclass(frozen=True)
class Token:
    text: str
    type: TokenType
    part: Part = Part.NEVER


SPECIAL = (
    Token("<unk>", TokenType.UNKNOWN),
    Token("<s>", TokenType.CONTROL),
    Token("<|im_end|>", TokenType.CONTROL, Part.END),
    Token("<|im_start|>", TokenType.CONTROL),
    Token("<|fim_prefix|>", TokenType.CONTROL),
    Token("<|fim_suffix|>", TokenType.CONTROL),
    Token("<|fim_middle|>", TokenType.CONTROL),
    Token("<think>", TokenType.USER_DEFINED),
    Token("</think>", TokenType.USER_DEFINED, Part.THOUGHT_END),
    Token("<tool_call>", TokenType.USER_DEFINED, Part.TOOL_CALL),
    Token("</tool_call>", TokenType.USER_DEFINED),
)


def vocabulary() -> list[Token]:
    """Special tokens, every byte, ASCII characters, the words and all of their beginnings."""
    tokens = list(SPECIAL)
    tokens += [
        Token(f"<0x{b:02X}>", TokenType.BYTE, Part.NEWLINE if b == ord("\n") else Part.NEVER) for b in range(256)
    ]
    tokens += [Token(c, TokenType.NORMAL, _character(c)) for c in "\u2581" + bytes(range(33, 127)).decode()]
    seen, words = {token.text for token in tokens}, {"\u2581" + word for word in WORDS}
    for word in sorted(words):
        # SPM merges pair by pair, so a word is only found when each of its beginnings is a token too.
        for piece in [word[:end] for end in range(1, len(word) + 1)] + list(word):
            if piece not in seen:
                seen.add(piece)
                tokens.append(Token(piece, TokenType.NORMAL, Part.WORD if piece in words else Part.NEVER))
    return tokens


def _character(c: str) -> Part:
    return Part.QUOTE if c == '"' else Part.JSON if c in ":,{}[]" else Part.CHARACTER


def biases(model: Model, words: int) -> dict[Part, float]:
    """The bias of each part, so that a part meant to come every n tokens has 1/n of the probability of all words."""
    all_words = math.log(words) + STD**2 / 2

    def every(length: float) -> float:
        return all_words - math.log(length) if length else NEVER_BIAS

    return {
        Part.WORD: 0.0,
        Part.CHARACTER: -7.0,
        Part.NEWLINE: -2.0,
        Part.JSON: -1.0,
        Part.QUOTE: all_words - 3.7,  # strings of a JSON answer close after some forty words
        Part.END: every(model.mean_len),
        Part.THOUGHT_END: every(model.think_len),
        Part.TOOL_CALL: every(model.tool_len),
        Part.NEVER: NEVER_BIAS,
    }


class Weights:
    """Random matrices, written as they are made. Their order is part of what makes the file the same every time."""

    def __init__(self, writer: GGUFWriter, seed: int) -> None:
        self._writer = writer
        self._random = np.random.default_rng(seed)

    def matrix(self, rows: int, columns: int, std: float) -> NDArray[np.float16]:
        return (self._random.standard_normal((rows, columns)) * std).astype(np.float16)

    def add(self, name: str, tensor: NDArray[np.float16]) -> None:
        self._writer.add_tensor(f"{name}.weight", tensor)

    def add_norm(self, name: str, size: int) -> None:
        self._writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    def add_vocabulary(self, model: Model, tokens: Sequence[Token]) -> None:
        """The embeddings with their constant dimension, and the output matrix with the biases in its first column."""
        embeddings = self.matrix(len(tokens), model.embd, 1.0)
        embeddings[:, 0] = math.sqrt(model.embd)
        constant = math.sqrt(model.embd / 2)  # about what the last RMS norm makes of it
        output = self.matrix(len(tokens), model.embd, STD / constant)
        bias = biases(model, sum(token.part is Part.WORD for token in tokens))
        for row, token in enumerate(tokens):
            if token.part not in (Part.WORD, Part.CHARACTER):
                output[row] = 0
            output[row, 0] = bias[token.part] / constant
        self.add("token_embd", embeddings)
        self.add("output", output)
        self.add_norm("output_norm", model.embd)

    def add_layer(self, model: Model, block: str) -> None:
        size, inner = model.embd, 2 * model.embd
        self.add_norm(f"{block}.attn_norm", size)
        self.add_norm(f"{block}.ffn_norm", size)
        for name in ("attn_q", "attn_k", "attn_v"):
            self.add(f"{block}.{name}", self.matrix(size, size, size**-0.5))
        self._add_back(model, f"{block}.attn_output", size)
        for name in ("ffn_gate", "ffn_up"):
            self.add(f"{block}.{name}", self.matrix(inner, size, size**-0.5))
        self._add_back(model, f"{block}.ffn_down", inner)

    def _add_back(self, model: Model, name: str, columns: int) -> None:
        """A matrix that writes to the residual stream: gently, the more layers there are, and never to dimension 0."""
        tensor = self.matrix(model.embd, columns, columns**-0.5)
        tensor *= np.float16(0.6 / math.sqrt(model.layers))
        tensor[0] = 0
        self.add(name, tensor)


def write_model(model: Model, path: Path) -> None:
    """Write the model file. A reranker is a qwen3 with a yes/no head, as llama.cpp expects for /v1/rerank."""
    tokens = vocabulary()
    writer = GGUFWriter(path, "qwen3" if model.rerank else "llama")
    _describe(writer, model)
    _describe_tokens(writer, tokens)
    weights = Weights(writer, model.seed)
    weights.add_vocabulary(model, tokens)
    for layer in range(model.layers):
        weights.add_layer(model, f"blk.{layer}")
        if model.rerank:
            weights.add_norm(f"blk.{layer}.attn_q_norm", HEAD_SIZE)
            weights.add_norm(f"blk.{layer}.attn_k_norm", HEAD_SIZE)
    if model.rerank:
        writer.add_array("qwen3.classifier.output_labels", ["yes", "no"])
        writer.add_uint32("qwen3.pooling_type", POOLING_RANK)
        weights.add("cls.output", weights.matrix(2, model.embd, model.embd**-0.5))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: GGUFWriter, model: Model) -> None:
    writer.add_name(model.name)
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    writer.add_context_length(model.ctx)
    writer.add_embedding_length(model.embd)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(2 * model.embd)
    writer.add_head_count(model.embd // HEAD_SIZE)
    writer.add_head_count_kv(model.embd // HEAD_SIZE)
    writer.add_layer_norm_rms_eps(1e-5)


def _describe_tokens(writer: GGUFWriter, tokens: Sequence[Token]) -> None:
    index = {token.text: i for i, token in enumerate(tokens)}
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_chat_template(TEMPLATE)
    writer.add_token_list([token.text.encode() for token in tokens])
    writer.add_token_types([int(token.type) for token in tokens])
    writer.add_token_scores([float(len(token.text)) for token in tokens])
    writer.add_unk_token_id(index["<unk>"])
    writer.add_bos_token_id(index["<s>"])
    writer.add_eos_token_id(index["<|im_end|>"])
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)  # with it, every grammar refuses the ChatML prompt
    for key, text in (("pre", "<|fim_prefix|>"), ("suf", "<|fim_suffix|>"), ("mid", "<|fim_middle|>")):
        writer.add_uint32(f"tokenizer.ggml.fim_{key}_token_id", index[text])


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a tiny random model.")
    parser.add_argument("out", type=Path)
    for field in fields(Model):
        flag = f"--{field.name.replace('_', '-')}"
        if field.type is bool:
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    write_model(Model(**{field.name: options[field.name] for field in fields(Model)}), options["out"])


if __name__ == "__main__":
    main()

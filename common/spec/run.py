"""What is trained and how: the one description that all three implementations read.

`TransformerSpec` is the model, `TrainSpec` the optimization, `RunConfig` one run of one framework.
All are frozen and validated on construction; a wrong value raises `pydantic.ValidationError`, which
`explain` turns into one line per field that says what is wrong and what would be right.

Every floating-point hyperparameter is rounded to float32 once, here (see
`common.spec.rounding.round_to_float32`).
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from common.io.edges import OsText, printable
from common.schedule import recompute
from common.schedule.action import MAX_PLACES
from common.spec.compression import Compression
from common.spec.rounding import finite_float32, round_to_float32


def _as_float32(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Check the bounds before and after rounding: 1e-320 is more than 0, its float32 is not."""
    return check(finite_float32(check(value)))


Float32 = Annotated[float, WrapValidator(_as_float32)]

Framework = Literal["torch", "tensorflow", "paddle"]
FRAMEWORKS: tuple[Framework, ...] = ("torch", "tensorflow", "paddle")


ELEMENT_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
"""By `TrainSpec.dtype`."""


class Frozen(BaseModel):
    """Base of all specifications: no unknown fields, no changes after construction."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )


class TransformerSpec(Frozen):
    """A Transformer: a causal language model, or an encoder that is trained on masked tokens.

    Pre-norm is GPT-2's (Radford et al. 2019): `x + f(norm(x))`, with a last norm in the head.
    Post-norm is the original (Vaswani et al. 2017): `norm(x + f(x))`, with none in the head. The
    key projection has no bias: softmax cancels it, its exact gradient is 0, and Adam would turn the
    rounding noise of that 0 into full steps.

    A Llama block (Touvron et al. 2023) is pre-norm with `norm_kind = rms`, `position = rotary`,
    `activation = swiglu`, `biases = false`, and often fewer `num_kv_heads`. BERT's (Devlin et al.
    2019) is post-norm with `causal = false`; what stands around its blocks (token types, a norm
    after the embedding, a layer before the head) is not here.
    """

    vocab_size: int = Field(
        256, ge=2, le=2**24, description="size of the vocabulary; 256 for bytes"
    )
    context_length: int = Field(64, ge=1, le=2**20, description="tokens in one sequence (S)")
    num_layers: int = Field(4, ge=1, le=10_000, description="Transformer blocks")
    d_model: int = Field(64, ge=1, le=2**20, description="width of the residual stream (D)")
    num_heads: int = Field(4, ge=1, description="attention heads (H); divides d_model")
    num_kv_heads: int | None = Field(
        None,
        ge=1,
        description="heads of keys and values, which groups of query heads share; divides "
        "num_heads (default: num_heads)",
    )
    d_ff: int = Field(256, ge=1, le=2**22, description="width of the feed-forward layer")
    causal: bool = Field(
        True,
        description="a token attends to itself and those before it; if not, to all: an encoder, "
        "trained on masked tokens",
    )
    norm: Literal["pre", "post"] = Field("pre", description="where the norms stand")
    norm_kind: Literal["layer", "rms"] = Field(
        "layer", description="layer: LayerNorm; rms: RMSNorm, which Llama has"
    )
    position: Literal["learned", "rotary"] = Field(
        "learned",
        description="learned: an embedding; rotary: queries and keys are turned by their position",
    )
    rope_theta: Float32 = Field(
        10_000.0, gt=1.0, description="rotary: the slowest pair of features turns by 1/theta"
    )
    activation: Literal["gelu", "gelu_tanh", "relu", "swiglu"] = Field(
        "gelu",
        description="gelu is the exact one, with erf; gelu_tanh its approximation, which GPT-2 "
        "has; swiglu: silu(gate) x up, a third matrix, which Llama has",
    )
    biases: bool = Field(True, description="linear layers and LayerNorm add a bias")
    tied_head: bool = Field(False, description="the head uses the token embedding, transposed")
    dropout: Float32 = Field(0.0, ge=0.0, lt=1.0, description="probability of dropping an element")
    dropout_masks: Literal["shared", "native"] = Field(
        "shared",
        description="shared: the same bits in every framework; native: the framework's own, not "
        "comparable",
    )
    norm_epsilon: Float32 = Field(1e-5, gt=0.0, description="added to the variance in LayerNorm")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TransformerSpec:
        if self.d_model % self.num_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} does not divide d_model = {self.d_model}; "
                f"expected one of {_divisors(self.d_model)}"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads = {self.kv_heads} does not divide num_heads = {self.num_heads}; "
                f"expected one of {_divisors(self.num_heads)}"
            )
        if self.position == "rotary" and self.d_head % 2:
            raise ValueError(
                f"position = rotary turns pairs of features, and a head has {self.d_head} of them; "
                "expected an even d_model / num_heads"
            )
        return self

    @property
    def d_head(self) -> int:
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


class TrainSpec(Frozen):
    """How the model is trained: mini-batches, optimizer, learning rate, clipping, precision."""

    steps: int = Field(20, ge=1, description="optimizer steps")
    batch_size: int = Field(
        16, ge=1, le=2**20, description="sequences in one mini-batch (one optimizer step)"
    )
    micro_batches: int = Field(
        4, ge=1, description="pieces the mini-batch is cut into (m), equal ones or nearly so"
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="update rule")
    learning_rate: Float32 = Field(1e-3, gt=0.0, description="peak learning rate")
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="after the warm-up: stay, fall linearly, or fall as a half cosine to 0",
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up before the schedule")
    beta1: Float32 = Field(0.9, ge=0.0, lt=1.0, description="AdamW: decay of the first moment")
    beta2: Float32 = Field(0.95, ge=0.0, lt=1.0, description="AdamW: decay of the second moment")
    epsilon: Float32 = Field(1e-8, gt=0.0, description="AdamW: added to sqrt(v / (1 - beta2^t))")
    momentum: Float32 = Field(0.0, ge=0.0, lt=1.0, description="SGD: momentum")
    weight_decay: Float32 = Field(
        0.1, ge=0.0, description="AdamW: decoupled; SGD: L2 added to the gradient"
    )
    no_decay: tuple[OsText, ...] = Field(
        ("*.bias", "*norm*"), description="patterns of parameter names that are not decayed"
    )
    clip_norm: Float32 | None = Field(
        1.0, gt=0.0, description="largest global gradient norm over all stages"
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="seed of the initial values, the batches and the dropout masks",
    )
    dtype: Literal["float32", "float64", "bfloat16"] = Field(
        "float32",
        description="precision of the arithmetic; bfloat16 keeps weights, gradients and moments "
        "in float32",
    )

    @model_validator(mode="after")
    def _consistent(self) -> TrainSpec:
        if self.micro_batches > self.batch_size:
            raise ValueError(
                f"micro_batches = {self.micro_batches} is more than batch_size = "
                f"{self.batch_size}, and a micro-batch has at least one sequence; expected 1 to "
                f"{self.batch_size}"
            )
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} is more than steps = {self.steps}; expected 0 "
                f"to {self.steps}"
            )
        return self

    @property
    def micro_batch_size(self) -> int:
        """Sequences in the first micro-batch; later ones may have one fewer."""
        return -(-self.batch_size // self.micro_batches)

    @property
    def micro_batch_sizes(self) -> tuple[int, ...]:
        """Sequences in every micro-batch: 10 in 4 are 3, 3, 2, 2."""
        size, larger = divmod(self.batch_size, self.micro_batches)
        return tuple(size + (i < larger) for i in range(self.micro_batches))

    @property
    def micro_batches_are_equal(self) -> bool:
        return self.batch_size % self.micro_batches == 0

    @property
    def master_dtype(self) -> Literal["float32", "float64"]:
        """Precision of weights, gradient sums and moments (Micikevicius et al. 2018)."""
        return "float64" if self.dtype == "float64" else "float32"

    def decays(self, name: str) -> bool:
        """Return whether weight decay applies to the parameter of this canonical name."""
        return self.weight_decay > 0 and not any(
            fnmatch.fnmatchcase(name, pattern) for pattern in self.no_decay
        )

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of `step` (from 0): linear warm-up, then down to 0."""
        if step < self.warmup_steps:
            return round_to_float32(self.learning_rate * (step + 1) / self.warmup_steps)
        # Of 10 steps with 2 of warm-up: half and whole rate, then 0 / 8 to 7 / 8 of the way down.
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        scale = {
            "constant": 1.0,
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        }[self.learning_rate_schedule]
        return round_to_float32(self.learning_rate * max(0.0, scale))


class RunConfig(Frozen):
    """One run: a model, its training, one framework, one partition, one schedule."""

    framework: Framework = Field(
        "torch", description="which implementation runs; torch@PATH: with this Python"
    )
    model: TransformerSpec = TransformerSpec()
    train: TrainSpec = TrainSpec()
    stages: int = Field(2, ge=1, description="devices in the pipeline (p)")
    chunks: int = Field(
        1, ge=1, description="model chunks per device (v), for interleaved schedules"
    )
    replicas: int = Field(
        1,
        ge=1,
        description="pipelines (d) that share every mini-batch, each stage a process of its own; "
        "micro_batches is the number for each",
    )
    reduce: Literal["overlap", "flush"] = Field(
        "overlap",
        description="replicas add up a chunk's gradients as soon as they are whole (overlap), or "
        "all behind the last action (flush)",
    )
    tensor_parallel: int = Field(
        1,
        ge=1,
        description="shards (t) that the matrices of every block are cut into, by heads and by "
        "features of the feed-forward layer, each shard a device of its own",
    )
    vocab_parallel: bool = Field(
        False, description="shards cut the token embedding and the head too, over the vocabulary"
    )
    compress: str = Field(
        "none",
        description="what replicas send instead of whole gradients: none, fp16, bf16, powersgd:R, "
        "topk:F, sign, or ef-sign (docs/compression.md)",
    )
    schedule: OsText = Field(
        "1f1b", min_length=1, description="name of the pipeline schedule, or file:PATH"
    )
    executor: Literal["table", "native", "plain"] = Field(
        "table",
        description="table: our schedule tables; native: the framework's own pipeline "
        "(torch.distributed.pipelining, "
        "Paddle's fleet); plain: a simple loop on one device, as its users would write it",
    )
    python: OsText | None = Field(
        None, min_length=1, description="the Python that has the framework; default: this one"
    )
    track: Literal["matched", "best"] = Field(
        "matched",
        description="matched: the same precision, threads and operations everywhere; best: what "
        "makes this framework "
        "fastest within the limits of parity",
    )
    partition: Literal["even", "balanced"] | tuple[int, ...] = Field(
        "even",
        description="even, balanced (by cost), or the first unit of every stage after the first",
    )
    recompute: str = Field(
        "none",
        pattern=recompute.PATTERN,
        description="what the backward computes again instead of holding it: none; full: all "
        "between a chunk's ends; "
        "except-last: the same, but not for the last micro-batch; every-N: pieces of N units, one "
        "after another",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto takes CUDA where the framework sees it"
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads of the whole run, shared by the stages, one each at least; "
        "default: all usable CPUs",
    )
    cuda_graphs: Literal["auto", "off"] = Field(
        "auto",
        description="PyTorch on GPUs: auto records a training step once and replays it, where the "
        "run allows it; off "
        "launches every kernel anew and takes less memory",
    )
    action_times: bool = Field(
        False,
        description="TensorFlow on GPUs: time every action, which makes the host wait for the GPU "
        "after each; without, a run has step times alone. All else is always timed",
    )
    corpus: tuple[OsText, ...] = Field(
        (),
        description="text files, folders and patterns such as 'texts/*.txt'; .jsonl (its field "
        "text) and .gz too; default: the manual that CPython carries",
    )
    tokenizer: Literal["bytes", "bpe", "file"] = Field(
        "bytes",
        description="bytes; bpe: byte-pair encoding, trained on the corpus; file: that of "
        "tokenizer_file",
    )
    tokenizer_file: OsText | None = Field(
        None,
        min_length=1,
        description="a tokenizer.json of the tokenizers library, whatever its kind",
    )
    sequence_lengths: Literal["full", "random"] = Field(
        "full",
        description="random: every sequence ends somewhere, and the labels after its end "
        "are ignored",
    )
    sequences_per_epoch: int | None = Field(
        None,
        ge=1,
        description="the last mini-batch of an epoch has what is left of it; default: every one "
        "is full",
    )
    drift: str | None = Field(
        None,
        description="one numerical habit to put back to a framework's default; `triptych drift "
        "--list` names them",
    )

    @property
    def schedule_name(self) -> str:
        """The schedule, for people: a file's name may have any bytes in it."""
        return printable(self.schedule, 1000)

    @property
    def recomputed_units(self) -> int | None:
        """Units per recomputed piece; 0 for the whole chunk, None for no recomputation."""
        if self.recompute == "none":
            return None
        return (
            int(self.recompute.removeprefix("every-")) if self.recompute.startswith("every-") else 0
        )

    @property
    def micro_batch_sizes(self) -> tuple[int, ...]:
        """Sequences in the micro-batches of replica 0, which has the largest: 10 sequences for 2
        replicas of 2 micro-batches are 3, 3 and 2, 2.
        """
        # All replicas' micro-batches are one row: the larger ones come first, in replica 0.
        size, larger = divmod(self.train.batch_size, self.replicas * self.train.micro_batches)
        return tuple(size + (i < larger) for i in range(self.train.micro_batches))

    def recomputes(self, micro_batch: int) -> bool:
        """Return whether the backward of this micro-batch computes its forward again."""
        return recompute.recomputes(self.recompute, micro_batch, self.train.micro_batches)

    @property
    def compression(self) -> Compression:
        return Compression.parse(self.compress)

    @field_validator("compress")
    @classmethod
    def _known_compression(cls, value: str) -> str:
        Compression.parse(value)
        return value

    @field_validator("partition", mode="before")
    @classmethod
    def _read_partition(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in ("even", "balanced"):
            try:
                return tuple(int(part) for part in value.split(","))
            except ValueError:
                raise ValueError(
                    f"{value!r}; expected even, balanced, or boundaries such as 2,5"
                ) from None
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.tokenizer == "bytes" and self.model.vocab_size != 256:
            raise ValueError(
                f"vocab_size = {self.model.vocab_size}; the tokenizer 'bytes' has 256 tokens"
            )
        if self.tokenizer == "file" and self.tokenizer_file is None:
            raise ValueError(
                "tokenizer = file: which? expected tokenizer_file, the path of a tokenizer.json"
            )
        if self.tokenizer == "bytes" and self.tokenizer_file is not None:
            raise ValueError("tokenizer = bytes: needs no tokenizer_file; expected one of the two")
        if self.sequence_lengths == "random" and not self.model.causal:
            raise ValueError(
                "sequence_lengths = random: an encoder (causal = false) would see what fills a "
                "sequence up; expected full"
            )
        parts = self.stages * self.chunks
        if parts * self.train.micro_batches > MAX_PLACES:
            raise ValueError(
                f"stages x chunks x micro_batches = {parts * self.train.micro_batches}; expected "
                f"at most {MAX_PLACES}"
            )
        pieces = self.replicas * self.train.micro_batches
        if self.replicas > 1 and pieces > self.train.batch_size:
            raise ValueError(
                f"replicas x micro_batches = {pieces} is more than batch_size = "
                f"{self.train.batch_size}, and a micro-batch has at least one sequence; expected "
                f"at most {self.train.batch_size}"
            )
        if self.executor == "plain" and parts > 1:
            raise ValueError(
                f"stages x chunks = {parts}; executor = plain has 1, with all the threads"
            )
        # A schedule's file says itself how many parts it has: `common.spec.rules` reads it.
        if not self.schedule.startswith("file:") and (why := self.why_not_cut(parts)):
            raise ValueError(why)
        return self

    def why_not_cut(self, parts: int) -> str | None:
        """Return why the model cannot be cut into so many parts; None if it can."""
        # No part may be empty: what holds nothing would have no backward to wait for.
        units = self.model.num_layers + 2
        if parts > units:
            return (
                f"stages x chunks = {parts} is more than the {units} units (embedding, "
                f"{self.model.num_layers} blocks, head); expected at most {units}"
            )
        if isinstance(self.partition, tuple):
            edges = (0, *self.partition, units)
            if len(self.partition) != parts - 1 or any(
                a >= b for a, b in itertools.pairwise(edges)
            ):
                return (
                    f"partition = {self.partition} needs {parts - 1} increasing boundaries between "
                    f"1 and {units - 1}"
                )
        return None


LLAMA = {"norm_kind": "rms", "position": "rotary", "activation": "swiglu", "biases": False}
"""What makes a block one of Llama's (Touvron et al. 2023)."""


def _sizes(
    context_length: int, num_layers: int, d_model: int, num_heads: int, d_ff: int, **more: Any
) -> dict[str, Any]:
    sizes = {"context_length": context_length, "num_layers": num_layers, "d_model": d_model}
    return sizes | {"num_heads": num_heads, "d_ff": d_ff} | more


_SHORT = {"steps": 10, "batch_size": 8, "micro_batches": 4}
_TIMED = {"steps": 8, "batch_size": 16, "micro_batches": 8, "warmup_steps": 4}
_GPT: dict[str, Any] = {"steps": 10, "batch_size": 8, "micro_batches": 8, "warmup_steps": 2}
_GPT |= {"learning_rate": 6e-4, "learning_rate_schedule": "cosine"}
_BPE = {"tokenizer": "bpe"}  # their vocabularies need it

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # Trains in seconds everywhere; the tests use it.
    "tiny": {"model": _sizes(16, 2, 32, 2, 64), "train": _SHORT},
    # The default of the benchmark: large enough that arithmetic, not Python, takes the time.
    "small": {"model": _sizes(128, 6, 256, 8, 1024), "train": _TIMED | {"learning_rate": 1e-3}},
    # The blocks of today: RMSNorm, rotary positions, SwiGLU, shared keys and values, no biases.
    "llama-tiny": {"model": _sizes(16, 2, 32, 4, 48, num_kv_heads=2, **LLAMA), "train": _SHORT},
    "llama-small": {
        "model": _sizes(128, 6, 256, 8, 688, num_kv_heads=2, **LLAMA),
        "train": _TIMED | {"learning_rate": 1e-3},
    },
    # BERT's block: every token attends to all, post-norm; trained on masked tokens.
    "bert-tiny": {"model": _sizes(16, 2, 32, 2, 64, causal=False, norm="post"), "train": _SHORT},
    # The shape of GPT-2 small (124 M parameters).
    "gpt2-small": {
        "model": _sizes(1024, 12, 768, 12, 3072, vocab_size=50257, tied_head=True, dropout=0.1),
        "train": _GPT,
        "run": _BPE,
    },
    # The shape of small Llamas (100 M parameters).
    "llama-100m": {
        "model": _sizes(1024, 12, 768, 12, 2048, vocab_size=32000, tied_head=True, num_kv_heads=4)
        | LLAMA,
        "train": _GPT,
        "run": _BPE,
    },
    # The textbook case: 48 layers over 4 stages with 4 micro-batches, narrow enough for a laptop.
    "deep48": {"model": _sizes(32, 48, 64, 4, 256), "train": _SHORT, "run": {"stages": 4}},
    # One billion parameters, for GPUs: every action takes long enough that the host keeps ahead.
    "gpu-1b": {
        "model": _sizes(1024, 20, 2048, 16, 8192),
        "train": _TIMED | {"learning_rate": 2e-4, "dtype": "bfloat16"},
    },
}


def preset(name: str) -> RunConfig:
    """Return the named preset as a `RunConfig`. Raises KeyError for an unknown name."""
    parts = PRESETS[name]
    return RunConfig(
        model=TransformerSpec(**parts.get("model", {})),
        train=TrainSpec(**parts.get("train", {})),
        **parts.get("run", {}),
    )


def explain(error: ValidationError) -> str:
    """Return one line per wrong field: its name, the value, what is expected."""
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"]) or "configuration"
        message = item["msg"].removeprefix("Value error, ")
        shown = (
            ""
            if isinstance(item["input"], dict | BaseModel)
            or item["type"] in ("value_error", "json_invalid")
            else f" = {item['input']!r}"
        )
        lines.append(f"{field}{shown}: {message}")
    return "\n".join(lines)


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]

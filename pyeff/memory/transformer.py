"""The tensors a decoder-only transformer keeps for its backward, node by node, as transformers' classes compute them.

With N tokens, s bytes an activation, widths h (residual), q and kv (heads x head size), f (MLP) and a heads, one Llama
layer trained whole keeps

    two norms       2 (4 N h [fp32: the input; bf16: its fp32 copy] + 4 N [rsqrt] + s N h [before the norm's weight]
                    + s N h [after it: the input of the projections])
    attention       s N (2 q + 2 kv) + 4 N a     q and k after the rotation, v, the output; the log-sum-exps in fp32
    MLP             4 s N f                      gate, silu(gate), up, their product

and one GPT-2 layer s N (2 h [inputs of the norms] + 2 h [their outputs] + 3 h [q, k, v] + h [attention's output]
+ 5 f [gelu_new in steps]) + 4 N a, four statistics of the norms, and a mask for each dropout. What is not trained keeps
less: a frozen matrix does not keep its input, a LoRA adapter keeps its own (in fp32 where the adapter is fp32 and the
model bf16, one copy for each adapter).

The account is of PyTorch's eager mode, checked against saved-tensor hooks; a compiled model keeps less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pyeff.memory.architecture import Adapters, Architecture
from pyeff.memory.tape import Buffer, Tape

Checkpointing = Literal["none", "layer", "attention"]
Head = Literal["logits", "fused"]

_FP32 = 4
_BLOCK = 128  # as `pyeff.memory.stored`, which needs torch
_BOOL = 1
# `linear_cross_entropy` forms the gradients by the logits a panel of classes at a time.
_PANEL_BYTES = {"cuda": 128 << 20, "cpu": 16 << 20}


@dataclass(frozen=True)
class Work:
    """One micro-batch: rows of `tokens` each, or one packed row (`packed`: a dense mask keeps its samples apart)."""

    batch: int
    tokens: int
    packed: bool = False
    head_tokens: int | None = None

    @property
    def all_tokens(self) -> int:
        """Tokens of the micro-batch, N."""
        return self.batch * self.tokens


def record_step(
    architecture: Architecture,
    work: Work,
    *,
    itemsize: int,
    device: str = "cuda",
    trained: bool = True,
    embedding_trained: bool = True,
    adapters: Adapters | None = None,
    checkpointing: Checkpointing = "none",
    compress: bool = False,
    offload: bool = False,
    head: Head = "logits",
    training: bool = True,
    input_gradients: bool = False,
) -> Tape:
    """Write down one micro-batch's forward pass.

    itemsize: bytes of a weight and of an activation (4 or 2). device: "cuda" or "cpu", which take different attention
    kernels. trained: the weights are; False with `adapters`. compress, offload: what checkpoints keep is held as
    `pyeff.checkpoint` holds it then, inputs in a byte an element and everything in host memory. head: "logits" holds
    them all as transformers' loss does, "fused" computes loss and gradients in blocks. training: dropout is on.
    input_gradients: the embedding's output requires a gradient although nothing in it is trained, as under
    `enable_input_require_grads`.
    """
    return _Recorder(
        architecture, work, itemsize, device, trained, embedding_trained, adapters, training, input_gradients
    ).record(checkpointing, compress, offload, head)


class _Recorder:
    def __init__(
        self,
        architecture: Architecture,
        work: Work,
        itemsize: int,
        device: str,
        trained: bool,
        embedding_trained: bool,
        adapters: Adapters | None,
        training: bool,
        input_gradients: bool,
    ) -> None:
        self.m, self.work, self.s, self.device = architecture, work, itemsize, device
        self.trained, self.embedding_trained = trained, embedding_trained
        self.adapters, self.training, self.input_gradients = adapters, training, input_gradients
        self.n = work.all_tokens
        self.tape = Tape()
        self.cos = Buffer("cos", work.tokens * architecture.head_dim * itemsize)
        self.sin = Buffer("sin", work.tokens * architecture.head_dim * itemsize)
        pairs = work.batch * work.tokens * work.tokens
        self.mask = Buffer("mask", pairs * _BOOL) if work.packed else None
        self.replaced_attention = False

    # ---- the model

    def record(self, checkpointing: Checkpointing, compress: bool, offload: bool, head: Head) -> Tape:
        m, tape = self.m, self.tape
        if checkpointing == "attention":
            # `pyeff.checkpoint` brings its own attention, which takes samples' borders in place of a mask.
            self.replaced_attention, self.mask = True, None
        x, named = self._embedding()
        for i in range(m.layers):
            # GPT-2 hands the mask on by position, and the checkpoint keeps every tensor among those.
            kept = [x, self.mask] if self.mask is not None and m.family == "gpt2" else [x]
            tape.begin(
                f"layer {i}",
                checkpoint=checkpointing != "none",
                inputs=kept,
                keep=checkpointing == "attention",
                compressed={x: _compressed(x, self.s)} if compress and x.grad else None,
                offload=offload and self.device == "cuda",
            )
            x = self._llama_layer(x) if m.family == "llama" else self._gpt2_layer(x)
        tape.begin("head")
        last = x
        x = self._rms_norm(x) if m.family == "llama" else self._layer_norm(x)
        # Variables of the model's forward name its first and its last hidden states until it returns.
        x = tape.op("output", [x], [Buffer("last hidden states", x.nbytes, base=x)], passes=True, held=[last, *named])
        self._head(x, head)
        return tape

    def _new(self, name: str, elements: int, itemsize: int | None = None) -> Buffer:
        return Buffer(name, elements * (self.s if itemsize is None else itemsize))

    def _embedding(self) -> tuple[Buffer, list[Buffer]]:
        m, n, tape = self.m, self.n, self.tape
        tape.begin("embedding")
        if self.mask is not None:  # three bytes a pair while it is made
            made = Buffer("mask being made", 2 * self.mask.nbytes)
            tape.op("mask", [self.mask], [made])
        ids = Buffer("token ids", n * 8)
        trained = self.embedding_trained and self.trained
        table = [("embedding", m.vocab * m.hidden * self.s)] if trained else []
        x = self._new("embedded tokens", n * m.hidden)
        tape.op("embedding", [ids], [x], saved=[ids], parameters=table)
        if m.family == "gpt2":
            places = Buffer("positions", self.work.tokens * 8)
            p = self._new("embedded positions", self.work.tokens * m.hidden)
            rows = [("positions", m.positions * m.hidden * self.s)] if trained else []
            tape.op("position embedding", [places], [p], saved=[places], parameters=rows)
            self._require_gradient(x)
            return self._dropout(self._add(x, p), m.embedding_dropout, n * m.hidden), [x, p]
        self._require_gradient(x)
        return x, [x]

    def _require_gradient(self, x: Buffer) -> None:
        if self.input_gradients and not x.grad:
            x.grad = True
            self.tape.leaves.append(x)

    def _llama_layer(self, x: Buffer) -> Buffer:
        n, m = self.n, self.m
        width, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
        y = self._rms_norm(x)
        q = self._rotate(self._linear(y, "q_proj", m.hidden, width), width)
        k = self._rotate(self._linear(y, "k_proj", m.hidden, kv), kv)
        v = self._linear(y, "v_proj", m.hidden, kv)
        out = self._attention(q, k, v)
        given, x = x, self._add(x, self._linear(out, "o_proj", width, m.hidden), held=[x, y])
        y = self._rms_norm(x)
        gate = self._activation(self._linear(y, "gate_proj", m.hidden, m.intermediate), n * m.intermediate)
        up = self._linear(y, "up_proj", m.hidden, m.intermediate)
        inner = self._new("activation(gate) * up", n * m.intermediate)
        self.tape.op("multiply", [gate, up], [inner], saved=_where(gate, up.grad) + _where(up, gate.grad))
        return self._add(x, self._linear(inner, "down_proj", m.intermediate, m.hidden), held=[given, y])

    def _gpt2_layer(self, x: Buffer) -> Buffer:
        n, m = self.n, self.m
        y = self._layer_norm(x)
        qkv = self._linear(y, "c_attn", m.hidden, 3 * m.hidden)
        parts = [Buffer(name, n * m.hidden * self.s, base=qkv) for name in ("q", "k", "v")]
        self.tape.op("split", [qkv], parts)
        out = self._attention(*parts)
        out = self._linear(out, "c_proj", m.hidden, m.hidden)
        given, x = x, self._add(x, self._dropout(out, m.residual_dropout, n * m.hidden), held=[x, y])
        y = self._layer_norm(x)
        inner = self._activation(self._linear(y, "c_fc", m.hidden, m.intermediate), n * m.intermediate)
        out = self._linear(inner, "c_proj", m.intermediate, m.hidden)
        return self._add(x, self._dropout(out, m.residual_dropout, n * m.hidden), held=[given, y])

    def _head(self, x: Buffer, head: Head) -> None:
        m, s, tape = self.m, self.s, self.tape
        rows = self.n if self.work.head_tokens is None else self.work.head_tokens
        if self.work.head_tokens is not None:
            chosen = self._new("hidden states with a loss", rows * m.hidden)
            tape.op("index", [x], [chosen])
            x = chosen
        name, trained = ("embedding", self.embedding_trained) if m.tied else ("head", True)
        weight = [(name, m.vocab * m.hidden * s)] if trained and self.trained else []
        saved = [x] if weight else []
        targets = Buffer("targets", rows * 8)
        if head == "fused":
            numbers = Buffer("losses of tokens", rows * _FP32), Buffer("log-sum-exps of the logits", rows * _FP32)
            # Logits of some classes, on a CPU in fp32 whatever the model is in, and these classes' weight gradient.
            size = _FP32 if self.device == "cpu" else s
            classes = min(m.vocab, _PANEL_BYTES[self.device] // max(1, rows * size))
            panel = classes * size * (rows + (m.hidden if weight else 0))
            tape.op(
                "linear cross entropy",
                [x],
                numbers,
                saved=[x, targets, *numbers],
                parameters=weight,
                workspace=panel,
                saves_weight=True,
            )
            return
        logits = self._new("logits", rows * m.vocab)
        tape.op("head", [x], [logits], saved=saved, parameters=weight, saves_weight=True)
        wide = self._cast(logits, rows * m.vocab, s, _FP32)
        logs = Buffer("log probabilities", rows * m.vocab * _FP32)
        tape.op("log softmax", [wide], [logs], saved=[logs])
        loss = Buffer("loss", _FP32)
        tape.op("nll", [logs, targets], [loss], saved=[logs, targets], held=[logits, wide])

    # ---- nodes

    def _linear(self, x: Buffer, name: str, size_in: int, size_out: int) -> Buffer:
        """y = x W: keeps x where W is trained."""
        n = self.n
        y = self._new(f"{name} output", n * size_out)
        bias = self.m.biases.get({"c_attn": "q", "c_fc": "up", "c_proj": "o"}.get(name, name.removesuffix("_proj")))
        elements = size_in * size_out + (size_out if bias else 0)
        key = f"{self.tape.layer}.{name}.{size_in}"
        weight = [(key, elements * self.s)] if self.trained else []
        self.tape.op(name, [x], [y], saved=_where(x, self.trained), parameters=weight, saves_weight=True)
        if self.adapters is None or name not in self.adapters.modules:
            return y
        rank, size = self.adapters.rank, self.adapters.itemsize
        cast = self._cast(x, n * size_in, self.s, size)
        inside = self._dropout(cast, self.adapters.dropout, n * size_in, size)
        low = Buffer(f"{name} lora_A output", n * rank * size)
        self.tape.op(
            "lora_A",
            [inside],
            [low],
            saved=[inside],
            saves_weight=True,
            parameters=[(f"{key}.lora_A", rank * size_in * size)],
        )
        high = Buffer(f"{name} lora_B output", n * size_out * size)
        self.tape.op("lora_B", [low], [high], saved=[low], parameters=[(f"{key}.lora_B", rank * size_out * size)])
        scaled = Buffer(f"{name} scaled adapter output", n * size_out * size)
        self.tape.op("scale", [high], [scaled])
        total = Buffer(f"{name} with adapter", n * size_out * max(size, self.s))
        self.tape.op("add", [y, scaled], [total], passes=size == self.s, held=[x, cast])
        return self._cast(total, n * size_out, max(size, self.s), self.s)

    def _cast(self, x: Buffer, elements: int, size: int, to: int) -> Buffer:
        if size == to:
            return x
        y = Buffer(f"{x.name} in {8 * to} bits", elements * to)
        return self.tape.op("to", [x], [y])

    def _add(self, x: Buffer, y: Buffer, *, held: Sequence[Buffer] = ()) -> Buffer:
        total = Buffer("residual stream", max(x.nbytes, y.nbytes))
        return self.tape.op("add", [x, y], [total], passes=True, held=held)

    def _dropout(self, x: Buffer, p: float, elements: int, itemsize: int | None = None) -> Buffer:
        """Keeps its mask: a byte an element on a GPU, an activation's own size on a CPU."""
        if p == 0 or not self.training:
            return x
        size = self.s if itemsize is None else itemsize
        mask = Buffer("dropout mask", elements * (_BOOL if self.device == "cuda" else size))
        y = Buffer("after dropout", elements * size)
        return self.tape.op("dropout", [x], [y, mask], saved=[mask])

    def _rms_norm(self, x: Buffer) -> Buffer:
        """x * rsqrt(mean(x^2)) * w in fp32 and eager steps: x, the root and the product before w are all kept."""
        n, h = self.n, self.m.hidden
        wide = self._cast(x, n * h, self.s, _FP32)
        root = Buffer("rsqrt of the mean square", n * _FP32)
        # x^2 on the way there; on the way back the gradient of the mean, 2x and their product.
        self.tape.op(
            "rsqrt", [wide], [root], saved=[wide, root], workspace=3 * n * h * _FP32, forward_workspace=n * h * _FP32
        )
        y = Buffer("normalised", n * h * _FP32)
        self.tape.op("multiply", [wide, root], [y], saved=[wide, root], workspace=n * h * _FP32)
        y = self._cast(y, n * h, _FP32, self.s)
        weight = [(f"{self.tape.layer}.norm{len(self.tape.segments[-1].ops)}", h * self.s)] if self.trained else []
        scaled = self._new("norm output", n * h)
        return self.tape.op(
            "norm weight",
            [y],
            [scaled],
            saved=_where(y, self.trained),
            parameters=weight,
            workspace=n * h * self.s,
            saves_weight=True,
        )

    def _layer_norm(self, x: Buffer) -> Buffer:
        n, h = self.n, self.m.hidden
        size = _FP32 if self.device == "cuda" else self.s
        mean, rstd = Buffer("mean", n * size), Buffer("reciprocal deviation", n * size)
        y = self._new("norm output", n * h)
        weight = [(f"{self.tape.layer}.norm{len(self.tape.segments[-1].ops)}", 2 * h * self.s)] if self.trained else []
        return self.tape.op("layer norm", [x], [y, mean, rstd], saved=[x, mean, rstd], parameters=weight)

    def _rotate(self, x: Buffer, width: int) -> Buffer:
        """x cos + turned(x) sin: keeps cos and sin, once for all layers."""
        elements = self.n * width
        near, turned = self._new("x cos", elements), self._new("turned", elements)
        far, y = self._new("turned sin", elements), self._new("rotated", elements)
        tape = self.tape
        tape.op("multiply", [x, self.cos], [near], saved=_where(self.cos, x.grad))
        tape.op("turn", [x], [turned], workspace=elements * self.s, forward_workspace=elements * self.s // 2)
        tape.op("multiply", [turned, self.sin], [far], saved=_where(self.sin, x.grad))
        return tape.op("add", [near, far], [y], passes=True)

    def _activation(self, x: Buffer, elements: int) -> Buffer:
        tape = self.tape
        if self.m.activation != "gelu_new":
            y = self._new(self.m.activation, elements)
            # relu keeps what it returns, the others what they were given.
            return tape.op(self.m.activation, [x], [y], saved=[y if self.m.activation == "relu" else x])
        names = ("x / 2", "x^3", "0.04 x^3", "x + 0.04 x^3", "scaled", "tanh", "1 + tanh", "gelu_new")
        half, cube, small, inner, scaled, tanh, one, y = (self._new(name, elements) for name in names)
        tape.op("scale", [x], [half])
        tape.op("pow", [x], [cube], saved=[x], workspace=2 * elements * self.s)
        tape.op("scale", [cube], [small])
        tape.op("add", [x, small], [inner], passes=True)
        tape.op("scale", [inner], [scaled])
        tape.op("tanh", [scaled], [tanh], saved=[tanh])
        tape.op("add", [tanh], [one], passes=True)
        return tape.op("multiply", [half, one], [y], saved=[half, one])

    def _attention(self, q: Buffer, k: Buffer, v: Buffer) -> Buffer:
        m, n, s, tape = self.m, self.n, self.s, self.tape
        width = m.heads * m.head_dim
        dropout = m.attention_dropout if self.training else 0.0
        grouped = m.kv_heads != m.heads
        fp32_on_gpu = self.device == "cuda" and s == _FP32  # no flash kernel there
        math = (self.device == "cpu" and dropout) or (fp32_on_gpu and grouped and self.mask is None)
        if m.eager and not self.replaced_attention:
            return self._eager_attention(q, k, v, dropout)
        if math and not self.replaced_attention:
            return self._math_attention(q, k, v, dropout)
        saved_mask = []
        if self.mask is not None:
            # The kernels with a mask know neither groups nor booleans.
            if grouped:
                k, v = (self._repeat(x, width) for x in (k, v))
            wide = self._new("mask in the activations' type", self.work.batch * self.work.tokens**2)
            tape.op("mask", [self.mask], [wide])
            saved_mask = [wide]
        out, lse = self._new("attention output", n * width), Buffer("log-sum-exps", n * m.heads * _FP32)
        # The GPU's kernels sum dQ in fp32 and, with groups, dK and dV of every query head.
        workspace = 0
        if self.device == "cuda":
            workspace = n * width * _FP32 + n * m.heads * _FP32 + (2 * n * width * s if grouped else 0)
        return tape.op(
            "attention",
            [q, k, v, *saved_mask],
            [out, lse],
            saved=[q, k, v, out, lse, *saved_mask],
            workspace=workspace,
            keep=[out, lse],
        )

    def _repeat(self, x: Buffer, width: int) -> Buffer:
        return self.tape.op("repeat", [x], [self._new("repeated", self.n * width)])

    def _math_attention(self, q: Buffer, k: Buffer, v: Buffer, dropout: float) -> Buffer:
        """softmax(q k^T) v written out, in fp32: the probabilities are kept, twice or three times with dropout."""
        m, n, tape = self.m, self.n, self.tape
        width, size = m.heads * m.head_dim, _FP32
        pairs = self.work.batch * m.heads * self.work.tokens**2
        if m.kv_heads != m.heads:
            k, v = self._repeat(k, width), self._repeat(v, width)
        # The scale goes into q and k before their product.
        q, k = (self._as(x, f"scaled {name}", n * width * size) for x, name in ((q, "q"), (k, "k")))
        v = self._laid_out(v, n * width * size)
        scores = Buffer("scores", pairs * size)
        tape.op("q k^T", [q, k], [scores], saved=[q, k])
        masked = Buffer("masked scores", pairs * size)
        tape.op("mask", [scores], [masked], passes=True)
        weights = Buffer("attention weights", pairs * size)
        tape.op("softmax", [masked], [weights], saved=[weights])
        weights = self._dropout(weights, dropout, pairs, size)
        summed = Buffer("weighted values", n * width * size)
        tape.op("weights v", [weights, v], [summed], saved=[weights, v])
        return self._as(summed, "attention output", n * width * self.s, keep=True)

    def _eager_attention(self, q: Buffer, k: Buffer, v: Buffer, dropout: float) -> Buffer:
        """transformers' own attention without a fused kernel: the softmax in fp32, the rest in the model's type."""
        m, n, s, tape = self.m, self.n, self.s, self.tape
        width = m.heads * m.head_dim
        pairs = self.work.batch * m.heads * self.work.tokens**2
        if m.kv_heads != m.heads:
            k, v = self._repeat(k, width), self._repeat(v, width)
        q, k, v = (self._laid_out(x, n * width * s) for x in (q, k, v))
        scores, scaled, masked = (self._new(name, pairs) for name in ("q k^T", "scaled scores", "masked scores"))
        tape.op("q k^T", [q, k], [scores], saved=[q, k])
        tape.op("scale", [scores], [scaled])
        tape.op("mask", [scaled], [masked], passes=True)
        inside = _FP32 if m.family == "llama" else s
        weights = Buffer("attention weights", pairs * inside)
        tape.op("softmax", [masked], [weights], saved=[weights])
        weights = self._dropout(self._cast(weights, pairs, inside, s), dropout, pairs)
        summed = self._new("weighted values", n * width)
        tape.op("weights v", [weights, v], [summed], saved=[weights, v])
        return self._as(summed, "attention output", n * width * s)

    def _laid_out(self, x: Buffer, nbytes: int) -> Buffer:
        """Heads before tokens in memory, for a batched product: a view where there is one row, a copy otherwise."""
        return x if self.work.batch == 1 and x.nbytes == nbytes else self._as(x, "copy with heads first", nbytes)

    def _as(self, x: Buffer, name: str, nbytes: int, *, keep: bool = False) -> Buffer:
        """A copy in another layout or type."""
        y = Buffer(name, nbytes)
        return self.tape.op("copy", [x], [y], keep=[y] if keep else ())


def _compressed(x: Buffer, itemsize: int) -> Buffer:
    """A byte an element, and a scale in fp32 for every block."""
    blocks = -(-x.nbytes // (itemsize * _BLOCK))
    return Buffer("compressed input", blocks * (_BLOCK + _FP32))


def _where(x: Buffer, condition: bool) -> list[Buffer]:
    return [x] if condition else []

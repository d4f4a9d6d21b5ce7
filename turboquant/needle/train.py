"""How is needle made? One run on one GPU, described by its arguments.

    python -m turboquant.needle.train --out FOLDER --minutes 6
    python -m turboquant.needle.train --out FOLDER --steps 4000,1200,500,700

With --minutes it times a few steps of every stage first and from then on takes a fixed number of steps; the
card has the --steps that repeat the run. A run that was cut short goes on from
FOLDER/checkpoint.safetensors when started again with the same arguments. The weights are written before
they are measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import site
import sysconfig
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from turboquant.needle import CARD, CONTEXT, HEAD_DIM, VOCABULARY, config, load, write_weights
from turboquant.needle.card import render
from turboquant.needle.corpus import ANSWER, TEMPLATE, TEXT, Corpus, Sequences, read_corpus
from turboquant.needle.measure import LENGTHS, measure

__all__ = ["main"]

# Tokens of a sequence and the stage's share of the time: long contexts last, after most of the language.
STAGES = ((1040, 0.30), (4160, 0.15), (16640, 0.15), (CONTEXT, 0.40))
TOKENS = 2 * CONTEXT  # a step's, in every stage, so that what is compiled once serves all
PEAK = 1.5e-3
WARMUP = 200
ANSWER_WEIGHT = 1.0  # the mean loss over asked codes counts as much as that over all other text
CHECKPOINT_SECONDS = 60
REPORT_SECONDS = 15
BEGAN = time.monotonic()
P = ParamSpec("P")
R = TypeVar("R")


def say(line: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - BEGAN:6.1f}s] {line}", flush=True)


@dataclass
class Plan:
    """What the run does: the stages' lengths and shares, tokens and steps."""

    stages: tuple[tuple[int, float], ...]
    tokens: int
    steps: list[int]

    def rows(self, stage: int) -> int:
        """Return the sequences in a step."""
        return self.tokens // self.stages[stage][0]

    def progress(self, stage: int, step: int) -> float:
        """Return how much of the run lies behind, 0 to 1."""
        return (
            sum(share for _, share in self.stages[:stage])
            + self.stages[stage][1] * step / max(1, self.steps[stage])
        ) / sum(share for _, share in self.stages)

    def rate(self, stage: int, step: int) -> float:
        """Return the learning rate: a short warm-up, then straight down to zero."""
        before = sum(self.steps[:stage]) + step
        return PEAK * min(1, (before + 1) / WARMUP) * (1 - self.progress(stage, step))


# The forward pass of transformers' Llama over flattened sequences (N = rows * length): nothing but attention
# sees where a sequence ends, so all stages and layers share what is compiled. A test holds it to the model's.
def norm(x: Tensor, weight: Tensor) -> Tensor:
    """Root mean square norm, (N, 512)."""
    wide = x.float()
    return weight.to(x.dtype) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def before_attention(
    x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, wq: Tensor, wk: Tensor, wv: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (N, 4, 128), keys and values (N, 2, 128) of hidden states (N, 512)."""
    h = norm(x, gain)
    q, k, v = (functional.linear(h, w.to(h.dtype)).view(len(x), -1, HEAD_DIM) for w in (wq, wk, wv))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (N, heads, 128); cos and sin are (N, 128)."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def after_attention(
    x: Tensor, attended: Tensor, wo: Tensor, gain: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> Tensor:
    """Hidden states (N, 512) after a layer whose attention gave (N, 512)."""
    x = x + functional.linear(attended, wo.to(x.dtype))
    h = norm(x, gain)
    gate, up = functional.linear(h, w_gate.to(h.dtype)), functional.linear(h, w_up.to(h.dtype))
    return x + functional.linear(functional.silu(gate) * up, w_down.to(h.dtype))


def losses(
    x: Tensor, gain: Tensor, embedding: Tensor, targets: Tensor, kinds: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss, and sums to report: nats and tokens of text, of templates, of answers; answers hit."""
    logits = functional.linear(norm(x, gain), embedding.to(x.dtype)).float()
    nats = functional.cross_entropy(logits, targets, reduction="none")
    masks = [(kinds == kind).float() for kind in (TEXT, TEMPLATE, ANSWER)]
    text, template, answer = ((nats * mask).sum() for mask in masks)
    counts = [mask.sum() for mask in masks]
    hits = ((logits.argmax(-1) == targets).float() * masks[2]).sum()
    loss = (text + template) / (counts[0] + counts[1]) + ANSWER_WEIGHT * answer / counts[2].clamp(min=1)
    sums = torch.stack([text, counts[0], template, counts[1], answer, counts[2], hits])
    return loss, sums.detach()


def compile_if(compiled: bool, function: Callable[P, R]) -> Callable[P, R]:
    """Return a function, compiled for the shapes that it first sees if so wanted."""
    return torch.compile(function, dynamic=False, fullgraph=True) if compiled else function


class Trainee:
    """The model with what a training step needs.

    Args:
        model: in float32; its parameters are what is trained.
        compiled: compile the parts between the attentions.
        dtype: of the activations.
    """

    def __init__(self, model: LlamaForCausalLM, *, compiled: bool, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self.backend: SDPBackend | None = None
        self.before = compile_if(compiled, before_attention)
        self.after = compile_if(compiled, after_attention)
        self.losses = compile_if(compiled, losses)
        matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
        others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=PEAK,
            betas=(0.9, 0.95),
            fused=model.device.type == "cuda",
        )

    def angles(self, length: int, rows: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of the rotary embedding, (rows * length, 128)."""
        places = torch.arange(length, device=self.model.device)[None]
        template = torch.empty(0, dtype=self.dtype, device=self.model.device)
        cos, sin = self.model.model.rotary_emb(template, places)
        return cos[0].repeat(rows, 1), sin[0].repeat(rows, 1)

    def loss(
        self, inputs: Tensor, targets: Tensor, kinds: Tensor, angles: tuple[Tensor, Tensor], length: int
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the sums to report of flat inputs and targets, (rows * length,)."""
        inner = self.model.model
        x = functional.embedding(inputs.long(), inner.embed_tokens.weight).to(self.dtype)
        for layer in inner.layers:
            a, m = layer.self_attn, layer.mlp
            q, k, v = self.before(
                x,
                *angles,
                layer.input_layernorm.weight,
                a.q_proj.weight,
                a.k_proj.weight,
                a.v_proj.weight,
            )
            x = self.after(
                x,
                attend(q, k, v, length, self.backend),
                a.o_proj.weight,
                layer.post_attention_layernorm.weight,
                m.gate_proj.weight,
                m.up_proj.weight,
                m.down_proj.weight,
            )
        return self.losses(x, inner.norm.weight, inner.embed_tokens.weight, targets.long(), kinds)

    def step(self, loss: Tensor, rate: float) -> Tensor:
        """Learn from a loss; return the gradient's norm."""
        loss.backward()  # type: ignore[no-untyped-call]
        size = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return size

    def save(self, path: Path, facts: dict[str, Any]) -> None:
        """Write parameters, what the optimizer knows of each, and facts (as JSON) to one safetensors file."""
        tensors = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"model/{name}"] = parameter.detach()
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state[parameter].items()}
        fresh = path.with_suffix(".new")
        save_file(tensors, fresh, metadata={"facts": json.dumps(facts)})
        # A run that is cut while it writes keeps the checkpoint before.
        os.replace(fresh, path)

    @torch.no_grad()
    def restore(self, path: Path, plan: dict[str, Any]) -> dict[str, Any]:
        """Take up the state that `save` wrote; return its facts.

        Args:
            path: the file.
            plan: what the facts must have as "plan".

        Raises:
            ValueError: if they have another.
        """
        with safe_open(path, framework="pt", device=str(self.model.device)) as file:
            facts: dict[str, Any] = json.loads(file.metadata()["facts"])
            if facts["plan"] != plan:
                raise ValueError(
                    f"{path} is of another run, {facts['plan']}, than the one asked for, {plan}; "
                    "give the same arguments, or another --out"
                )
            parameters = dict(self.model.named_parameters())
            for key in file.keys():  # noqa: SIM118 (no mapping)
                kind, name = key.split("/", 1)
                if kind == "model":
                    parameters[name].copy_(file.get_tensor(key))
                else:
                    self.optimizer.state[parameters[name]][kind] = file.get_tensor(key).clone()
        return facts


def attend(q: Tensor, k: Tensor, v: Tensor, length: int, backend: SDPBackend | None) -> Tensor:
    """Causal attention within every sequence: q (N, 4, 128), k and v (N, 2, 128) to (N, 512)."""
    q, k, v = (t.view(-1, length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(backend) if backend else nullcontext():
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1).flatten(1)


def choose_backend(plan: Plan, device: torch.device) -> SDPBackend:
    """Time the attention kernels forward and backward at the longest length; return the faster right one."""
    length = max(length for length, _ in plan.stages)
    draw = torch.Generator(device).manual_seed(0)

    def random(heads: int) -> Tensor:
        shape = (plan.tokens // length * length, heads, HEAD_DIM)
        return torch.randn(shape, generator=draw, device=device, dtype=torch.bfloat16)

    q, k, v, weight = random(4), random(2), random(2), random(4).flatten(1)
    results: dict[SDPBackend, tuple[float, list[Tensor]]] = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]

        def run(backend: SDPBackend = backend, leaves: list[Tensor] = leaves) -> list[Tensor]:
            out = attend(leaves[0], leaves[1], leaves[2], length, backend)
            return [out.detach(), *torch.autograd.grad(out, leaves, weight)]

        try:
            found = run()
        except RuntimeError as error:
            say(f"attention by {backend.name} is not available here: {error}")
            continue
        seconds = timed(run, 5)
        results[backend] = (seconds, found)
        say(f"attention by {backend.name}: {1e3 * seconds:.2f} ms a layer, forward and backward")
    if SDPBackend.FLASH_ATTENTION not in results:
        raise RuntimeError("flash attention does not run on this device; train on CUDA capability 8.0 up")
    for backend, (_, found) in list(results.items()):
        for ours, flash in zip(found, results[SDPBackend.FLASH_ATTENTION][1], strict=True):
            difference = float((ours.float() - flash.float()).norm() / flash.float().norm())
            if not difference < 0.02:
                say(f"attention by {backend.name} differs from flash's by {difference:.3g}: not used")
                results.pop(backend, None)
    return min(results, key=lambda backend: results[backend][0])


def timed(run: Callable[[], object], times: int) -> float:
    """Return the seconds that a call takes on a GPU, on average after one that is not counted."""
    run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def plan_steps(plan: Plan, trainee: Trainee, minutes: float) -> list[int]:
    """Time every stage's step without learning; return the steps that fill the minutes by the shares."""
    device = trainee.model.device
    draw = torch.Generator(device).manual_seed(0)
    whole = sum(share for _, share in plan.stages)
    steps = []
    for stage, (length, share) in enumerate(plan.stages):
        size = plan.rows(stage) * length
        ids = torch.randint(3, 259, (size,), generator=draw, device=device)
        kinds = torch.randint(0, 4, (size,), generator=draw, device=device, dtype=torch.uint8)
        angles = trainee.angles(length, plan.rows(stage))

        def run(
            batch: tuple[Tensor, Tensor, Tensor] = (ids, ids, kinds),
            angles: tuple[Tensor, Tensor] = angles,
            length: int = length,
        ) -> None:
            trainee.loss(*batch, angles, length)[0].backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trainee.model.parameters(), 1.0)
            trainee.optimizer.zero_grad(set_to_none=True)

        seconds = timed(run, 10)
        steps.append(max(1, round(minutes * 60 * share / whole / (seconds + 0.001))))
        say(
            f"stage {stage}: length {length}, {1e3 * seconds:.1f} ms a step, "
            f"{size / seconds / 1e6:.2f} M tokens/s: {steps[-1]} steps"
        )
    return steps


def train(
    trainee: Trainee, corpus: Corpus, plan: Plan, seed: int, out: Path, workers: int
) -> list[dict[str, Any]]:
    """Run the stages, from the checkpoint if there is one; return what each stage's last steps reached."""
    device = trainee.model.device
    checkpoint = out / "checkpoint.safetensors"
    described = {
        "seed": seed,
        "stages": [list(s) for s in plan.stages],
        "tokens": plan.tokens,
        "steps": plan.steps,
    }
    first_stage = first_step = 0
    history: list[dict[str, Any]] = []
    if checkpoint.is_file():
        saved = trainee.restore(checkpoint, described)
        first_stage, first_step, history = saved["stage"], saved["step"], saved["history"]
        say(f"going on from stage {first_stage}, step {first_step}")

    def save(stage: int, step: int) -> None:
        trainee.save(checkpoint, {"plan": described, "stage": stage, "step": step, "history": history})

    for stage in range(first_stage, len(plan.stages)):
        length, rows, steps = plan.stages[stage][0], plan.rows(stage), plan.steps[stage]
        skip = first_step if stage == first_stage else 0
        batches = DataLoader(
            Sequences(corpus.train, seed=seed, stage=stage, length=length, rows=rows, steps=steps),
            batch_size=None,
            sampler=range(skip, steps),
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
            prefetch_factor=8 if workers else None,
            pin_memory=device.type == "cuda",
        )
        angles = trainee.angles(length, rows)
        sums = torch.zeros(7, device=device)
        counted = skip
        reported = saved_at = time.monotonic()
        for step, batch in enumerate(batches, skip):
            inputs, targets, kinds = (t.to(device, non_blocking=True) for t in batch)
            loss, found = trainee.loss(inputs, targets, kinds, angles, length)
            size = trainee.step(loss, plan.rate(stage, step))
            sums += found
            now = time.monotonic()
            if now - reported > REPORT_SECONDS or step in (0, steps - 1):
                values = reading(sums)
                if not all(math.isfinite(value) for value in values.values()):
                    raise FloatingPointError(f"stage {stage}, step {step}: {values}; lower the learning rate")
                # Reading waits for the device, so the clock now tells what the steps took.
                now = time.monotonic()
                speed = (step + 1 - counted) * rows * length / (now - reported) / 1e6
                left = (steps - step - 1) * rows * length / speed / 1e6
                say(
                    f"stage {stage} length {length} step {step + 1}/{steps}: text {values['text']:.4f} bits "
                    f"a byte, template {values['template']:.3f}, answers {values['answers']:.4f}, digits "
                    f"right {values['digits']:.5f}, gradient {float(size):.2f}, rate "
                    f"{plan.rate(stage, step):.2e}, {speed:.2f} M tokens/s, stage done in {left:.0f}s"
                )
                if step == steps - 1:
                    reached = {"length": length, "steps": steps, "tokens": steps * rows * length}
                    history.append(reached | values)
                sums.zero_()
                counted = step + 1
                reported = now
            if now - saved_at > CHECKPOINT_SECONDS:
                save(stage, step + 1)
                saved_at = now
        save(stage + 1, 0)
    return history


def reading(sums: Tensor) -> dict[str, float]:
    """Return what the sums of `losses` say: bits a token, and the share of digits right."""
    text, texts, template, templates, answer, answers, hits = (float(value) for value in sums.tolist())
    bits = [a / max(b, 1) / math.log(2) for a, b in ((text, texts), (template, templates), (answer, answers))]
    return dict(zip(("text", "template", "answers"), bits, strict=True)) | {"digits": hits / max(answers, 1)}


def new_model(seed: int) -> LlamaForCausalLM:
    """Return the model as training finds it, in float32: drawn on the CPU from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config())
    layers = model.model.layers
    with torch.no_grad():
        for layer in layers:
            # What each layer adds starts small, so that depth does not set the scale.
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight /= math.sqrt(2 * len(layers))
    return model


def installed() -> list[Path]:
    """Return the folders of this Python's own modules and packages."""
    paths = sysconfig.get_paths()
    found = [paths["stdlib"], paths["purelib"], paths["platlib"], *site.getsitepackages()]
    return [path for path in sorted({Path(p).resolve() for p in found}) if path.is_dir()]


def main(arguments: list[str] | None = None) -> None:
    """Train, write the weights, measure them, and write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, card and checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the data (0)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=6.0, help="about how long to train on this GPU (6)")
    length.add_argument("--steps", help="steps of each stage, which --minutes would work out")
    parser.add_argument("--text", type=Path, action="append", help="folders to read (this Python's)")
    parser.add_argument("--workers", type=int, default=12, help="processes that prepare batches (12)")
    parser.add_argument("--trials", type=int, default=1000, help="haystacks a cell to measure (1000)")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens of measured prefixes")
    parser.add_argument("--windows", type=int, default=256, help="windows of each text to score (256)")
    parser.add_argument("--stages", help="length:share of each stage, for trials of the script")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of a step, likewise")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    stages: tuple[tuple[int, float], ...] = STAGES
    if options.stages:
        stages = tuple((int(a), float(b)) for a, b in (s.split(":") for s in options.stages.split(",")))
    if any(options.tokens % length for length, _ in stages):
        parser.error(f"--tokens {options.tokens} is no multiple of every length in {stages}")
    steps = [int(part) for part in options.steps.split(",")] if options.steps else []
    if (steps and len(steps) != len(stages)) or any(count < 1 for count in steps):
        parser.error(f"--steps {options.steps} is not one positive number for each of {len(stages)} stages")
    if not steps and not cuda:
        parser.error("--minutes times a GPU; without one, give --steps")
    options.out.mkdir(parents=True, exist_ok=True)

    machine = {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    say(f"training on {machine}")
    folders = options.text or installed()
    corpus = read_corpus(folders)
    say(f"read {', '.join(map(str, folders))}: {corpus.facts}")
    torch.backends.cuda.matmul.allow_tf32 = True
    model = new_model(options.seed)
    nn.Module.to(model, device)
    trainee = Trainee(model, compiled=cuda, dtype=torch.bfloat16 if cuda else torch.float32)
    plan = Plan(stages=stages, tokens=options.tokens, steps=steps)
    if cuda:
        trainee.backend = choose_backend(plan, device)
    if not steps:
        # A run that goes on keeps the steps that it began with.
        kept = options.out / "steps.json"
        if kept.is_file():
            plan.steps = json.loads(kept.read_text(encoding="utf-8"))
        else:
            plan.steps = plan_steps(plan, trainee, options.minutes)
            kept.write_text(json.dumps(plan.steps), encoding="utf-8")
    text = ",".join(map(str, plan.steps))
    say(f"{text} steps of {plan.tokens} tokens; --seed {options.seed} --steps {text} repeats this run")
    history = train(trainee, corpus, plan, seed=options.seed, out=options.out, workers=options.workers)
    card: dict[str, Any] = {
        "parameters": sum(p.numel() for p in trainee.model.parameters()),
        "vocabulary": VOCABULARY,
        "context": CONTEXT,
        "weights": write_weights(trainee.model, options.out),
        "training": {
            "seed": options.seed,
            "steps": plan.steps,
            "step_tokens": plan.tokens,
            "peak_rate": PEAK,
            "stages": history,
            "corpus": corpus.facts,
            "attention": trainee.backend.name if trainee.backend else "default",
            "seconds": round(time.monotonic() - BEGAN),
            **machine,
        },
    }

    def keep(figures: dict[str, Any]) -> None:
        whole = card | figures
        (options.out / CARD).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        (options.out / "CARD.md").write_text(render(whole), encoding="utf-8")

    keep({})
    say(f"wrote weights and card to {options.out}; measuring")
    shipped, _ = load(device, weights=options.out)
    measure(
        shipped,
        {"training": torch.from_numpy(corpus.train), "held out": torch.from_numpy(corpus.held_out)},
        trials=options.trials,
        windows=options.windows,
        lengths=tuple(int(part) for part in options.lengths.split(",")),
        keep=keep,
        say=say,
    )
    say("done")


if __name__ == "__main__":
    main()

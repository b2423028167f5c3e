"""The plan as tables of a hundred columns: memory and time of every stage, what does not fit, and what was assumed."""

from __future__ import annotations

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from r1v2_fast.plan import memory, time
from r1v2_fast.plan.stages import GIB, Remedy, Stage

WIDTH = 100
MARK = "computed, not measured"


def render(stages: list[tuple[Stage, list[Remedy]]], console: Console) -> None:
    """Print the plan of `stages`, each with what would make it fit."""
    first = stages[0][0]
    console.print(Text(f"{first.recipe.run.name} on {first.count} x {first.gpu.title}: {MARK}", style="bold"))
    for stage, found in stages:
        console.print()
        console.print(_title(stage))
        console.print(_side_by_side(_memory(stage), _time(stage)))
        console.print(_verdict(stage, found))
    console.print()
    console.print(Text("Assumptions", style="bold"))
    for line in assumptions(first):
        console.print(_indented(line))


def _side_by_side(left: RenderableType, right: RenderableType) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(left, right)
    return grid


def _title(stage: Stage) -> Text:
    work, row = stage.work, stage.work.largest
    of_gpu = f"{len(work.rows)} micro-batch{'es' if len(work.rows) > 1 else ''}"
    sampled = f"{work.prompts} prompts x {work.group_size} responses" if work.group_size else f"{work.prompts} prompts"
    return Text.assemble(
        (f"{stage.name}", "bold"),
        f", a step of one GPU: {sampled}, {work.prompt:,} + {work.response:,} tokens;\n"
        f"  {of_gpu} of at most {row.tokens:,} {'packed' if row.packed else 'padded'} tokens",
    )


def _memory(stage: Stage) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column(f"memory, --shard {stage.shard}")
    table.add_column("GiB", justify="right")
    for phase, parts in stage.memory.items():
        if not parts:
            continue
        for name, size in parts.items():
            table.add_row(name, f"{size / GIB:,.2f}")
        size = stage.sums[phase]
        label = "held throughout" if phase == "held" else f"held and {phase}"
        style = "bold red" if size > stage.room else "bold"
        table.add_row(Text(label, style), Text(f"{size / GIB:,.1f}", style), end_section=True)
    table.add_row("room of the GPU", f"{stage.room / GIB:,.1f}")
    return table


def _time(stage: Stage) -> Table:
    parts = stage.time
    total = time.sum_of(parts)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("time")
    table.add_column("s", justify="right")
    table.add_column("%", justify="right")
    table.add_column("bound by")
    for name, part in parts.items():
        table.add_row(name, seconds(part.seconds), f"{part.seconds / total:.0%}", part.bound)
    table.add_section()
    table.add_row(Text("step", "bold"), Text(seconds(total), "bold"), "", "")
    work = stage.work
    table.add_row("tokens/s trained, of the step", f"{work.tokens * stage.count / total:,.0f}", "", "")
    if work.group_size:
        rollout = time.sum_of(parts, time.ROLLOUT)
        table.add_row("tokens/s sampled in rollout", f"{work.sampled * stage.count / rollout:,.0f}", "", "")
    table.add_row("MFU of training", f"{time.mfu(parts, stage.machine):.0%}", "", "")
    return table


def seconds(value: float) -> str:
    """Three digits at most: 1,234, 56.7, 0.89, <0.01."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.01 or value == 0 else "<0.01"


def _verdict(stage: Stage, found: list[Remedy]) -> Group:
    lines = []
    for remedy in found:
        took = f"a step of {seconds(time.sum_of(remedy.stage.time))} s"
        lines.append(f"It fits with {' '.join(remedy.changes)}: {took}.")
    if stage.over and not found:
        lines.append("Nothing that was tried makes it fit: the recipe's knobs, up to 64 GPUs, larger GPUs.")
    waits = stage.time.get(time.ROLLOUT[-1])
    if waits is not None and waits.seconds > stage.time["decode"].seconds:
        lines.append(
            "Full sharding gathers the model for every token sampled: GPUs that hold it whole (--shard none) or "
            "rollout.engine=vllm save that wait."
        )
    head = [Text(why, style="red") for why in reasons(stage)] or [Text("It fits.", style="green")]
    return Group(*head, *(_indented(line) for line in lines))


def _indented(line: str) -> Padding:
    return Padding(Text(line), (0, 0, 0, 2), expand=False)


def reasons(stage: Stage) -> list[str]:
    """A sentence for every phase that does not fit, with its largest part."""
    lines = []
    over = ["held"] if "held" in stage.over else stage.over
    for phase in over:
        name, size = max(stage.memory[phase].items(), key=lambda item: item[1])
        what = "What is held throughout" if phase == "held" else f"The {phase}"
        needed, room = stage.sums[phase] / GIB, stage.room / GIB
        lines.append(
            f"{what} does not fit: {needed:,.1f} GiB of {room:,.1f} GiB; its largest part is {name}, {size / GIB:,.1f} GiB"
        )
    return lines


def assumptions(stage: Stage) -> list[str]:
    """What the numbers rest on, a line each."""
    gpu, e, needs = stage.gpu, stage.efficiency, stage.needs
    rate = "fp32" if needs.width == 4 else "bf16"
    lines = [
        f"{gpu.title}: {stage.machine.peak / 1e12:,.4g} TFLOP/s {rate}, {gpu.memory / GIB:.1f} GiB, "
        f"{gpu.bandwidth / 1e12:.2f} TB/s, NVLink {gpu.nvlink / 1e9:.0f} GB/s a direction ({gpu.source})",
        f"room: memory less {memory.RESERVE:.0%} for the allocator and {memory.CONTEXT / GIB:.2f} GiB of CUDA context",
        *(
            f"{name}: {share.value:.0%} of the peak ({share.source})"
            for name, share in (
                ("layers' products", e.matmul), ("attention", e.attention), ("log-prob op", e.head),
                ("memory bandwidth", e.bandwidth), ("links", e.link),
            )
        ),
        "every response has its full length, every group is informative; a step's prompts are dealt out evenly",
        f"a picture of {stage.tiles} tile{'s' if stage.tiles > 1 else ''} a prompt, none of them repeated; tokens/s: of all GPUs",
        f"attention: {needs.attention}" + (", for model.attention auto" if stage.recipe.model.attention == "auto" else ""),
        "rewards, the optimizer's host work, evaluation and checkpoints take no time",
    ]  # fmt: skip
    if stage.recipe.model.fused_layers == "auto":
        lines.append("model.fused_layers auto is taken as off; with liger-kernel activations are a third smaller")
    if stage.recipe.rollout.engine == "vllm":
        lines.append("rollout.engine vllm: the server's memory and time are its own, not counted")
    if stage.count > 8:
        lines.append(f"between nodes of 8: {stage.between_nodes / 1e9:,.0f} GB/s a node (--bandwidth)")
    return lines

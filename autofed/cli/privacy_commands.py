"""Privacy: what trainings have cost (ledger), and attacks on the guarantee (audit)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from autofed.cli import terminal
from autofed.cli.options import (
    Alpha,
    AuditKind,
    CanarySite,
    DeviceName,
    DeviceOption,
    InversionOption,
    JsonOption,
    Kind,
    LedgerArgument,
    PlanArgument,
)


def ledger(
    site: LedgerArgument,
    json: JsonOption = False,
    open_: Annotated[bool, typer.Option("--open", help="Open it, with a ceiling over all future trainings.")] = False,
    epsilon: Annotated[float | None, typer.Option(help="The ceiling, with --open.")] = None,
    delta: Annotated[float | None, typer.Option(help="The delta of the ceiling, with --open.")] = None,
    simulation: Annotated[
        bool,
        typer.Option(
            "--simulation", help="With --open: for simulations, which protect no real patient; seeds are allowed."
        ),
    ] = False,
) -> None:
    """Show a site's ledger: the privacy that trainings have cost its patients, what is left, and what that means."""
    if not open_ and (epsilon is not None or delta is not None or simulation):
        raise typer.BadParameter("--epsilon, --delta and --simulation go with --open")
    from autofed.api import ledgers

    statement = ledgers.ledger_statement(
        ledgers.open_ledger(site, epsilon, delta, simulation) if open_ else ledgers.find_ledger(site)
    )
    if json:
        typer.echo(statement.model_dump_json(indent=2))
    else:
        terminal.show_ledger(statement)


def audit(
    plan: PlanArgument,
    site: CanarySite = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A JSON file for the result.")] = None,
    kind: Kind = AuditKind.gradient,
    public: Annotated[Path | None, typer.Option(help="With --kind labels: a folder of public images.")] = None,
    canaries: Annotated[
        int | None, typer.Option(help="How many; default 1000, with --kind image or labels 100.")
    ] = None,
    alpha: Alpha = 0.05,
    inversion: InversionOption = None,
    iterations: Annotated[int, typer.Option(help="Steps of the reconstruction, with --inversion.", min=1)] = 600,
    device: DeviceOption = DeviceName.auto,
) -> None:
    """Attack a plan's guarantee with planted patients (canaries). Nothing leaves this machine."""
    if inversion is not None:
        if public is not None:
            raise typer.BadParameter("--public goes with --kind labels, not with --inversion")
        _invert(plan, site, inversion, iterations)
        return
    from autofed import api

    options: dict[str, Any] = {
        "kind": kind.value, "public": public, "canaries": canaries, "alpha": alpha, "device": device.value,
    }  # fmt: skip
    with terminal.progress() as progress:
        result = api.audit(plan, site, output, **options, progress=progress)
    typer.echo(result.text())
    typer.echo("Nothing left this machine, and no ledger was charged.")
    if output is not None:
        typer.echo(f"written to {output}")
    if result.refuted:
        raise typer.Exit(1)


def _invert(plan: Path, site: Path | None, picture: Path, iterations: int) -> None:
    from autofed import api, report
    from autofed.files import write_bytes

    with terminal.progress() as progress:
        result = api.inversion(plan, site, iterations=iterations, progress=progress)
    write_bytes(picture, report.draw_inversion(result))
    for name, metrics in (
        ("without the mechanism", result.without.likeness),
        (f"with {result.mechanism}", result.protected.likeness),
        ("a blank image", result.blank),
        ("the label map alone", result.label),
    ):
        typer.echo(f"{name:<22} PSNR {metrics.psnr:5.1f} dB  SSIM {metrics.ssim:.3f}")
    typer.echo(f"look at {picture}; it shows the patient's patch, so it stays on this machine")

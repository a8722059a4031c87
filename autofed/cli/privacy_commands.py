"""What was promised to patients and what it is worth: ledger, audit."""

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
    open_: Annotated[bool, typer.Option("--open", help="Open it, with a ceiling over all trainings to come.")] = False,
    epsilon: Annotated[float | None, typer.Option(help="The ceiling, with --open.")] = None,
    delta: Annotated[float | None, typer.Option(help="The delta of the ceiling, with --open.")] = None,
    simulation: Annotated[
        bool, typer.Option("--simulation", help="With --open: nobody's privacy rests on it, so seeds are allowed.")
    ] = False,
) -> None:
    """What trainings cost a hospital's patients in privacy, what is left, and what that promises them."""
    if not open_ and (epsilon is not None or delta is not None or simulation):
        raise typer.BadParameter("--epsilon, --delta and --simulation go with --open")
    from autofed.api import ledgers

    found = ledgers.ledger_statement(
        ledgers.open_ledger(site, epsilon, delta, simulation) if open_ else ledgers.find_ledger(site)
    )
    if json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        terminal.show_ledger(found)


def audit(
    plan: PlanArgument,
    site: CanarySite = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="What was found, a JSON file.")] = None,
    kind: Kind = AuditKind.gradient,
    public: Annotated[Path | None, typer.Option(help="With --kind labels: a folder of public images.")] = None,
    canaries: Annotated[int | None, typer.Option(help="Default 1000, of images 100.")] = None,
    alpha: Alpha = 0.05,
    inversion: InversionOption = None,
    iterations: Annotated[int, typer.Option(help="Of the reconstruction.", min=1)] = 600,
    device: DeviceOption = DeviceName.auto,
) -> None:
    """What an attacker can tell of planted patients, beside what the plan promises. Nothing leaves this machine."""
    if inversion is not None:
        if public is not None:
            raise typer.BadParameter("--public goes with --kind labels, not with --inversion")
        _invert(plan, site, inversion, iterations)
        return
    from autofed import api

    wanted: dict[str, Any] = {
        "kind": kind.value, "public": public, "canaries": canaries, "alpha": alpha, "device": device.value,
    }  # fmt: skip
    with terminal.progress() as progress:
        found = api.audit(plan, site, output, **wanted, progress=progress)
    typer.echo(found.text())
    typer.echo("Nothing left this machine, and no ledger was charged.")
    if output is not None:
        typer.echo(f"written to {output}")
    if found.refuted:
        raise typer.Exit(1)


def _invert(plan: Path, site: Path | None, picture: Path, iterations: int) -> None:
    from autofed import api, report
    from autofed.files import write_bytes

    with terminal.progress() as progress:
        found = api.inversion(plan, site, iterations=iterations, progress=progress)
    write_bytes(picture, report.draw_inversion(found))
    for name, likeness in (
        ("without the mechanism", found.without.likeness),
        (f"with {found.mechanism}", found.protected.likeness),
        ("a blank image", found.blank),
        ("the label map alone", found.label),
    ):
        typer.echo(f"{name:<22} PSNR {likeness.psnr:5.1f} dB  SSIM {likeness.ssim:.3f}")
    typer.echo(f"look at {picture}; it shows the patient's patch, so it stays on this machine")

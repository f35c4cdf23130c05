"""Ceilings that 06_speed measured, instead of those of a data sheet."""

import dataclasses
from pathlib import Path

from lib.chips import Chip, chip
from lib.config import Config
from lib.files import UserError, local_path, read_json
from lib.preflight import roofline
from lib.preflight.estimate import Report
from lib.preflight.hlo import Work


def calibrated(known: Chip, path: str | Path) -> Chip:
    """A chip with the ceilings that a file of 06_speed measured on one of its kind.

    UserError where the file is of another kind of chip or dtype, or no such file.
    """
    path = local_path(path)
    fields = read_json(path, cure="write one with 06_speed")
    device, flops, bandwidth = map(fields.get, ("device", "flops", "bandwidth"))
    are_ceilings = all(isinstance(rate, int | float) and rate > 0 for rate in (flops, bandwidth))
    if not isinstance(device, str) or not are_ceilings:
        raise UserError(f"{path} was not written by 06_speed: it lacks device, flops or bandwidth")
    measured = chip(device)
    if measured is None or measured.name != known.name:
        raise UserError(
            f"{path} was measured on {device}, not on {known.name}: run 06_speed on one of those"
        )
    if (dtype := fields.get("dtype", known.dtype)) != known.dtype:
        raise UserError(
            f"{path} was measured in {dtype}, and preflight plans in {known.dtype} there: "
            f"run 06_speed with --overrides compute_dtype={known.dtype}"
        )
    return known._replace(name=f"{known.name}, measured", flops=flops, bandwidth=bandwidth)


def recalibrate(report: Report, config: Config, sheet: Chip, measured: Chip) -> Report:
    """A report with its bounds under measured ceilings; MFU stays a share of the data sheet's
    FLOP/s.
    """
    components = {}
    for name, bound in report.bound.items():
        if name == "step":
            continue
        # what a matrix unit does beside the FLOPs that count is only known where that binds
        busy = bound.seconds * sheet.flops if bound.binds == "compute" else bound.flops
        components[name] = Work(flops=bound.flops, busy=busy, bytes=bound.bytes)
    bounds = roofline.bound(components, measured, report.sent)

    seconds = bounds["step"].seconds
    ceilings = f"{measured.flops / 1e12:.3g} TFLOP/s, {measured.bandwidth / 1e9:.4g} GB/s measured"
    return dataclasses.replace(
        report,
        bound=bounds,
        mfu=roofline.mfu(config, seconds, sheet, report.chips),
        tokens_per_s=config.total_batch_size / seconds,
        source=f"{report.source}; ceilings of {ceilings}",
    )

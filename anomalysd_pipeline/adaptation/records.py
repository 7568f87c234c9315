"""Check the records of parts and of adaptations, which `model_index.json` and `adaptation.json` bring."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields

import numpy as np

from ..common.checks import require_kind, require_number, require_whole, shown
from ..data.depth import check_bit_depth
from ..data.inputs import check_fingerprints
from ..data.region import unpack_region
from ..data.tiles import check_tiles
from ..method.calibration import Calibration, check_rate
from ..method.prompts import PROMPT_DESIGNS, check_category
from ..method.settings import InspectionSettings
from .settings import AdaptationSettings

MOST = 10_000
"""Normal pictures of a part; parts, and adaptations, of a pipeline."""
MOST_ROTATIONS = 360
_PART = {"shots", "rotations", "noise_strength", "adaptation", "prompt_design", "calibration"}
_OPTIONAL = {
    "digests",
    "fingerprints",
    "bit_depth",
    "region",
    "tile_size",
    "tile_overlap",
}  # earlier versions lack them
_UNUSED = "adapted"  # of earlier versions; nothing looks at it now
# A map that is zero everywhere counts as the smallest normal number, see `calibrate_threshold`.
_SCORES = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def check_records(categories: object, adaptations: object) -> tuple[dict[str, dict], dict[str, dict]]:
    """Checks the records of all parts and adaptations, and copies them.

    Raises:
        ValueError: for a name, a key or a value that this package would not have written, or an adaptation that a
            part names and that is not there.
    """
    for argument, records in (("categories", categories), ("adaptations", adaptations)):
        require_kind(argument, records, Mapping, "a dictionary from names to records")
        require_whole(f"len({argument})", len(records), 0, MOST)
    checked = [
        {check_category(name): _named(argument, name, check, record) for name, record in records.items()}
        for argument, check, records in (
            ("categories", check_part, categories),
            ("adaptations", check_adaptation, adaptations),
        )
    ]
    for name, record in checked[0].items():
        if record["adaptation"] is not None and record["adaptation"] not in checked[1]:
            raise ValueError(
                f"`categories` lets {name!r} rest on the adaptation {shown(record['adaptation'])}, which is not among "
                "`adaptations`."
            )
    return checked[0], checked[1]


def _named(argument: str, name: str, check, record: object) -> dict:
    try:
        return check(record)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"`{argument}` has a bad record of {name!r}: {error}") from error


def check_part(record: object) -> dict:
    """Copies the record of a part, once inspections can rely on it.

    Raises:
        ValueError: for other keys, or a value out of its range.
    """
    require_kind("record", record, Mapping, "a dictionary")
    record = {key: copy.deepcopy(value) for key, value in record.items() if key != _UNUSED}
    if record.keys() - _OPTIONAL != _PART:
        raise ValueError(f"`record` must have the keys {', '.join(sorted(_PART))}, got {shown(sorted(record))}.")
    require_whole("shots", record["shots"], 1, MOST)
    require_whole("rotations", record["rotations"], 1, MOST_ROTATIONS)
    if record["noise_strength"] is not None:
        require_number("noise_strength", record["noise_strength"], 0, 1, above=True)
    if record["adaptation"] is not None:
        check_category(record["adaptation"])
    if record["prompt_design"] not in PROMPT_DESIGNS:
        raise ValueError(f"`prompt_design` must be one of {PROMPT_DESIGNS}, got {shown(record['prompt_design'])}.")
    _check_digests(record.get("digests", []))
    check_fingerprints(record.get("fingerprints", []))
    check_bit_depth(record.get("bit_depth"))
    check_tiles(record.get("tile_size", 0), record.get("tile_overlap", 0))
    if record.get("region") is not None:
        unpack_region(record["region"])
    if record["calibration"] is not None:
        _check_calibration(record["calibration"])
    return record


def _check_calibration(record: object) -> None:
    require_kind("calibration", record, Mapping, "a dictionary")
    calibration = Calibration(**record)
    require_kind("settings", calibration.settings, Mapping, "a dictionary")
    InspectionSettings.of(calibration.settings)
    require_number("false_alarm_rate", calibration.false_alarm_rate, 0, 1)
    check_rate(calibration.false_alarm_rate)
    require_number("threshold", calibration.threshold, *_SCORES)
    require_kind("scores", calibration.scores, list, "a list of numbers")
    require_whole("len(scores)", len(calibration.scores), 1, MOST)
    require_kind("defective_scores", calibration.defective_scores, list, "a list of numbers")
    require_whole("len(defective_scores)", len(calibration.defective_scores), 0, MOST)
    for score in [*calibration.scores, *calibration.defective_scores]:
        require_number("scores", score, 0, _SCORES[1])
    require_whole("pictures", calibration.pictures, 1, MOST)
    require_kind("held_out", calibration.held_out, bool, "true or false")
    _check_digests(calibration.digests)
    _check_digests(calibration.defective_digests)
    if len(calibration.defective_scores) != len(calibration.defective_digests):
        raise ValueError("`defective_scores` and `defective_digests` must be as many.")
    check_fingerprints(calibration.fingerprints)
    for share in (calibration.expected_false_alarms, calibration.expected_misses):
        if share is not None:
            require_number("expected_misses", share, 0, 1)
    require_whole("version", calibration.version, 1, MOST)
    require_kind("classes", calibration.classes, Mapping, "a dictionary of names")
    for part, name in calibration.classes.items():
        if part not in ("scheduler", "vae") or not isinstance(name, str):
            raise ValueError(f"`classes` must name a 'scheduler' and a 'vae', got {shown(calibration.classes)}.")


def _check_digests(digests: object) -> None:
    if not isinstance(digests, list) or len(digests) > MOST or not all(isinstance(one, str) for one in digests):
        raise ValueError(f"`digests` must be a list of at most {MOST} words, got {shown(digests)}.")


def check_adaptation(record: object) -> dict:
    """Copies the record of an adaptation, once its settings are such that one can be made with.

    Raises:
        TypeError, ValueError: for other keys, or a value out of its range.
    """
    if not isinstance(record, Mapping) or record.keys() != {"settings"}:
        raise ValueError(f"`record` must be a dictionary of the key 'settings', got {shown(record)}.")
    require_kind("settings", record["settings"], Mapping, "a dictionary")
    unknown = record["settings"].keys() - {field.name for field in fields(AdaptationSettings)}
    if unknown:
        raise ValueError(f"`settings` has {shown(sorted(unknown))}, which is no setting of a fine-tuning.")
    AdaptationSettings.resolve([record["settings"]])
    return copy.deepcopy(dict(record))

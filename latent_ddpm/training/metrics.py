"""Read metrics.jsonl: its records, and whether the last validation is the best one."""

import json
from pathlib import Path


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a line that is still being written is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record.get("images_per_second") == 0:  # earlier versions wrote this for "not measured"
            del record["images_per_second"]
        records.append(record)
    return records


# the figure that hub_strategy "best" compares, and 1 if higher is better
BEST_BY = {"autoencoder": ("validation_psnr", 1), "unet": ("validation_loss", -1)}


def is_best(output_dir: Path, stage: str, step: int, after: int = 0) -> bool:
    """Whether the validation at `step` in metrics.jsonl is finite and better than all earlier ones.

    Validations up to step `after` do not count, such as those before the codes of an autoencoder enter.
    """
    key, sign = BEST_BY[stage]
    records = [r for r in read_metrics(output_dir / "metrics.jsonl") if r["stage"] == stage and key in r]
    records = [record for record in records if record["step"] > after]
    values = [sign * record[key] for record in records]
    return bool(records) and records[-1]["step"] == step and all(value < values[-1] for value in values[:-1])

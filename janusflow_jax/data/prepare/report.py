"""What was kept, what was skipped and why: counts with the first examples, in a fixed order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from janusflow_jax.data.prepare.raw import Skip

EXAMPLES = 5
"""Of each reason, the first so many are named."""

Reasons = dict[str, dict[str, Any]]
"""reason -> {count, examples: [where, detail] each}."""


@dataclasses.dataclass
class Report:
    """Counts of a shard, or of a whole data set."""

    records: dict[str, int] = dataclasses.field(default_factory=dict)  # by split
    skipped: Reasons = dataclasses.field(default_factory=dict)
    dropped: Reasons = dataclasses.field(default_factory=dict)  # captions of kept records

    @property
    def num_records(self) -> int:
        return sum(self.records.values())

    @property
    def num_skipped(self) -> int:
        return sum(found["count"] for found in self.skipped.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "records": dict(sorted(self.records.items())),
            "num_skipped": self.num_skipped,
            "skipped": dict(sorted(self.skipped.items())),
            "dropped_captions": dict(sorted(self.dropped.items())),
        }


def add(reasons: Reasons, skip: Skip, count: int = 1) -> None:
    """Counts one."""
    found = reasons.setdefault(skip.reason, {"count": 0, "examples": []})
    found["count"] += count
    if len(found["examples"]) < EXAMPLES:
        found["examples"].append([skip.where[:200], skip.detail[:200]])


def total(reports: Iterable[dict[str, Any]]) -> Report:
    """The sum of shards' reports (`Report.to_json`), in their order."""
    out = Report()
    for report in reports:
        for split, count in report["records"].items():
            out.records[split] = out.records.get(split, 0) + count
        for into, name in ((out.skipped, "skipped"), (out.dropped, "dropped_captions")):
            for reason, found in report[name].items():
                mine = into.setdefault(reason, {"count": 0, "examples": []})
                mine["count"] += found["count"]
                mine["examples"] = (mine["examples"] + found["examples"])[:EXAMPLES]
    return out


def table(report: Report) -> str:
    """For people: splits, then reasons by count, each with its first examples."""
    lines = [f"{split}: {count:,} records" for split, count in sorted(report.records.items())]
    seen = report.num_records + report.num_skipped
    share = f" ({report.num_skipped / seen:.1%} of {seen:,})" if seen else ""
    lines.append(f"skipped: {report.num_skipped:,}{share}")
    lines += _reasons(report.skipped)
    if report.dropped:
        count = sum(found["count"] for found in report.dropped.values())
        lines.append(f"captions dropped from records with others: {count:,}")
        lines += _reasons(report.dropped)
    return "\n".join(lines)


def _reasons(reasons: Reasons) -> list[str]:
    lines = []
    for reason, found in sorted(reasons.items(), key=lambda x: (-x[1]["count"], x[0])):
        lines.append(f"{found['count']:>10,}  {reason}")
        for where, detail in found["examples"][:2]:
            lines.append(f"{'':>14}{where}" + (f": {detail}" if detail else ""))
    return lines

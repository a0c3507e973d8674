"""The plan of a set of experiments, read from YAML as strictly as a configuration."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cmt_aqr.config import load_config
from cmt_aqr.strict_yaml import build, limits
from cmt_aqr.yaml_reader import read_yaml


@dataclass(frozen=True)
class Variant:
    """One of the settings that are compared."""

    name: str  # of its folder and its line in the table
    config: str  # YAML file, or the bare name of one in configs
    settings: tuple[str, ...]  # KEY=VALUE, after those of the plan
    seeds: tuple[int, ...] = limits(low=0, high=2**32 - 1, entries=(1, 1000))


@dataclass(frozen=True)
class Plan:
    """A set of experiments."""

    reference: str  # the variant that the others are compared with
    settings: tuple[str, ...]  # KEY=VALUE of all variants
    failures: tuple[str, ...]  # of test.py --failure; a suite is named as in --failures
    variants: tuple[Variant, ...] = limits(entries=(1, 1000))

    @property
    def jobs(self) -> list[tuple[Variant, int]]:
        """Variants and seeds, the first seed of all variants first, so that the results of a part can be compared."""
        most = max(len(variant.seeds) for variant in self.variants)
        return [(v, v.seeds[i]) for i in range(most) for v in self.variants if i < len(v.seeds)]


def read_plan(path: Path) -> Plan:
    """Read a plan, and check it and all its configurations.

    Raises:
        ConfigError: lists what is wrong in it.
    """
    plan = build(Plan, read_yaml(path), str(path), CHECKS, {})
    for variant in plan.variants:
        load_config(variant.config, [*plan.settings, *variant.settings])
    return plan


def settings_of(plan: Plan, variant: Variant) -> list[str]:
    """KEY=VALUE of a variant's runs."""
    return [*plan.settings, *variant.settings]


def _check_names(plan: Plan) -> Iterable[tuple[str, str]]:
    counts = Counter(variant.name for variant in plan.variants)
    for name, count in counts.items():
        if count > 1:
            yield "variants", f"two variants have the name {name!r}"
        if not name or not all(letter.isalnum() or letter in "_-" for letter in name):
            yield "variants", f"the name {name!r} is that of a folder: use letters, digits, _ and -"
    if plan.reference not in counts:
        yield "reference", f"no variant has the name {plan.reference!r}; there are {', '.join(counts)}"


def _check_seeds(plan: Plan) -> Iterable[tuple[str, str]]:
    for variant in plan.variants:
        if len(set(variant.seeds)) < len(variant.seeds):
            yield "variants", f"{variant.name} has a seed twice: {list(variant.seeds)}"


CHECKS = ((("variants", "reference"), _check_names), (("variants",), _check_seeds))

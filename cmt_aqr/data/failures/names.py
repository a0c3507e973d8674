"""Parse the failures that a user writes, such as ``beams:4`` or ``view_drop:FRONT,BACK``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cmt_aqr.classes import CAMERAS
from cmt_aqr.data.failures.cases import CASES, SUITES, Case
from cmt_aqr.data.sample import DataError
from cmt_aqr.yaml_reader import suggest

_PREFIX = "CAM_"


@dataclass(frozen=True)
class Failure:
    """One failure at one severity.

    Attributes:
        case: key of ``CASES``.
        level: key of the case's ``levels``.
        views: channels that fail, in the order of ``CAMERAS``; None: all that the case affects.
    """

    case: str
    level: str
    views: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """As a user writes it: ``beams:4``, ``lidar_drop``, ``view_drop:FRONT,BACK``."""
        level = self.level
        if self.views is not None:
            views = ",".join(view.removeprefix(_PREFIX) for view in self.views)
            level = views if self.level == next(iter(self.definition.levels)) else f"{self.level},{views}"
        return f"{self.case}:{level}" if level else self.case

    @property
    def file_name(self) -> str:
        """The name without characters that cause trouble in file names."""
        return self.name.replace(":", "_").replace(",", "-")

    @property
    def definition(self) -> Case:
        """The entry of ``CASES``."""
        return CASES[self.case]

    @property
    def parameter(self) -> Any:
        """The parameter that the case's functions are called with."""
        return self.definition.levels[self.level]


def parse_failure(text: str, source: str = "--failure") -> list[Failure]:
    """``NAME``, ``NAME:LEVEL`` or ``NAME:VIEW,VIEW``; the name alone means the case's usual levels.

    Args:
        text: as written.
        source: first words of an error's sentence.

    Raises:
        DataError: no such case, level or camera.
    """
    name, _, rest = text.partition(":")
    where = f"{source} {text!r}"
    if name not in CASES:
        raise DataError(
            f"{where}: no failure is called {name!r}, expected one of {', '.join(CASES)}{suggest(name, CASES)}"
        )
    case = CASES[name]
    if ":" not in text:
        return [Failure(name, level) for level in case.bare or case.levels]
    parts = [part.strip() for part in rest.split(",")]
    level = parts.pop(0) if parts[0] in case.levels and parts[0] else next(iter(case.levels))
    if not parts:
        return [Failure(name, level)]
    if not case.takes_views:
        raise DataError(f"{where}: {name} {_choices(case, rest)}")
    return [Failure(name, level, _views(parts, case, where))]


def _choices(case: Case, rest: str) -> str:
    levels = [level for level in case.levels if level]
    if not levels:
        return f"takes no level, expected the name alone, got {rest!r}"
    return f"takes one of the levels {', '.join(levels)}, got {rest!r}{suggest(rest, levels)}"


def _views(parts: Sequence[str], case: Case, where: str) -> tuple[str, ...]:
    """Channels in their order, from names with or without CAM_ in either case."""
    short = [camera.removeprefix(_PREFIX) for camera in CAMERAS]
    found = set()
    for part in parts:
        name = part.upper().removeprefix(_PREFIX)
        if name not in short:
            options = [*(level for level in case.levels if level), *short]
            raise DataError(
                f"{where}: no camera or level is called {part!r}, expected {', '.join(options[:-1])} or {options[-1]}"
                f"{suggest(name, options)}"
            )
        found.add(f"{_PREFIX}{name}")
    return tuple(camera for camera in CAMERAS if camera in found)


def parse_failures(texts: Sequence[str], suite: str | None = None) -> list[Failure]:
    """The failures of ``--failure`` options and of a suite, in the order given, each once.

    Raises:
        DataError: see :func:`parse_failure`; or no such suite.
    """
    if suite is not None and suite not in SUITES:
        raise DataError(
            f"--failures {suite!r}: unknown suite, expected one of {', '.join(SUITES)}{suggest(suite, SUITES)}"
        )
    failures = [failure for text in texts for failure in parse_failure(text)]
    failures += [failure for text in SUITES.get(suite, ()) for failure in parse_failure(text, "--failures")]
    return list(dict.fromkeys(failures))


def keep_applicable(failures: Sequence[Failure], sensors: Sequence[str]) -> tuple[list[Failure], list[Failure]]:
    """Failures that affect a sensor of a model (``lidar``, ``camera``), and those that do not."""
    affecting = [failure for failure in failures if set(failure.definition.sensors) & set(sensors)]
    return affecting, [failure for failure in failures if failure not in affecting]


def name_problems(names: Sequence[str], sensors: Sequence[str], key: str = "data.failures") -> list[str]:
    """Problems with the names in a configuration, one sentence each; ``sensors`` as in :func:`keep_applicable`."""
    problems = []
    for number, name in enumerate(names):
        where = f"{key}[{number}].case"
        try:
            applicable, _ = keep_applicable(parse_failure(name, where), sensors)
        except DataError as error:
            problems.append(str(error))
        else:
            if not applicable:
                problems.append(f"{where} {name!r}: {affects_nothing(sensors)}")
    return problems


def affects_nothing(sensors: Sequence[str]) -> str:
    """The end of a sentence about a failure that affects no sensor of a model with these sensors."""
    return f"it affects no sensor of this model, which has {' and '.join(sensors)} only"

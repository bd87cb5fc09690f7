"""What the simulator reports: named findings with the PTX and, where known, the Python line."""

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something wrong with the program.

    Attributes:
      kind: its name, such as ``shared-memory race`` (README.md lists them).
      where: the PTX line, the Python line where known, and the instruction.
      detail: what was seen.
    """

    kind: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}\n    at {self.where}"


class SimulationError(Exception):
    """The program cannot go on or misbehaved; ``findings`` says how."""

    def __init__(self, findings: list[Finding]):
        self.findings = findings
        super().__init__("\n".join(str(f) for f in findings))


class FindingLog:
    """Collects findings; each (kind, place) is kept once and counted."""

    def __init__(self):
        self.findings: list[Finding] = []
        self.counts: Counter = Counter()

    def add(self, kind: str, statement, detail: str) -> None:
        where = statement.where() if statement is not None else "end of the block"
        key = (kind, where)
        self.counts[key] += 1
        if self.counts[key] == 1:
            self.findings.append(Finding(kind, where, detail))

    def fatal(self, kind: str, statement, detail: str) -> None:
        self.add(kind, statement, detail)
        raise SimulationError(self.findings)

"""What every rank found, and what it means in a sentence each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

RIGHT, WRONG, RAISED, LEFT_OUT, NO_ANSWER = "right", "wrong", "raised", "left out", "no answer"
# A link is named as slow below this share of the median of those of its kind.
SLOW = 0.25


@dataclass(frozen=True)
class Outcome:
    """What came of one check on one rank.

    Attributes:
        check: Its name.
        state: RIGHT, WRONG, RAISED, LEFT_OUT or NO_ANSWER.
        said: How far off, what it raised, why it was left out.
        seconds: It took.
    """

    check: str
    state: str
    said: str
    seconds: float


@dataclass(frozen=True)
class Link:
    """Two ranks that sent to each other at once.

    Attributes:
        ranks: Both.
        latency: Seconds of a small message.
        rate: Bytes a second of a large one, each way.
        within: Whether they are on one host.
    """

    ranks: tuple[int, int]
    latency: float
    rate: float
    within: bool


@dataclass
class RankReport:
    """What one rank has to say: who it is, its outcomes in order, links that it measured."""

    rank: int
    about: dict[str, str]
    outcomes: list[Outcome] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def of_text(text: str) -> RankReport:
        found = json.loads(text)
        links = [Link(tuple(link.pop("ranks")), **link) for link in found["links"]]
        outcomes = [Outcome(**outcome) for outcome in found["outcomes"]]
        return RankReport(found["rank"], found["about"], outcomes, links)


@dataclass(frozen=True)
class Report:
    """What all ranks found.

    Attributes:
        ranks: What each said; None where it did not answer.
        failure: Of processes that died or did not answer, in words.
    """

    ranks: Sequence[RankReport | None]
    failure: str = ""

    @property
    def answered(self) -> list[RankReport]:
        return [rank for rank in self.ranks if rank is not None]

    @property
    def is_silent(self) -> bool:
        """Whether some rank gave no answer."""
        states = {o.state for rank in self.answered for o in rank.outcomes}
        return bool(self.failure) or None in self.ranks or NO_ANSWER in states

    @property
    def links(self) -> list[Link]:
        return [link for rank in self.answered for link in rank.links]

    def checks(self) -> dict[str, list[tuple[int, Outcome]]]:
        """Outcomes by check, in order, each with its rank."""
        found: dict[str, list[tuple[int, Outcome]]] = {}
        for rank in self.answered:
            for outcome in rank.outcomes:
                found.setdefault(outcome.check, []).append((rank.rank, outcome))
        return found

    def sentences(self) -> list[str]:
        """What is wrong, and what to do; nothing where all is right."""
        found = [*self._differences(), *self._silence()]
        for check, outcomes in self.checks().items():
            found += _of_check(check, outcomes)
        return [*found, *self._slow_links()]

    def _differences(self) -> list[str]:
        found = []
        for name in ("usp", "torch", "compiled ops"):
            ranks: dict[str, list[int]] = {}
            for rank in self.answered:
                ranks.setdefault(rank.about.get(name, ""), []).append(rank.rank)
            if len(ranks) > 1:
                told = "; ".join(f"{which} on ranks {_some(r)}" for which, r in ranks.items())
                found.append(f"ranks differ in {name}: {told}. Install the same on every node.")
        return found

    def _silence(self) -> list[str]:
        found = [f"{self.failure}. Look at what that rank printed."] if self.failure else []
        missing = [rank for rank, said in enumerate(self.ranks) if said is None]
        if missing and not self.failure:
            found.append(
                f"no answer at all from ranks {_some(missing)}. Look at what they printed."
            )
        stuck = {rank.rank: rank.outcomes[-1] for rank in self.answered if _hangs(rank)}
        if stuck:
            found.append(self._of_hang(stuck))
        return found

    def _of_hang(self, stuck: dict[int, Outcome]) -> str:
        """Who keeps the others waiting."""
        order = list(self.checks())
        first = min(stuck.values(), key=lambda outcome: order.index(outcome.check)).check
        waiting = [rank for rank, outcome in stuck.items() if outcome.check == first]
        came = {rank for rank, _ in self.checks()[first]}
        late = [rank for rank in range(len(self.ranks)) if rank not in came]
        told = (
            f"{first}: ranks {_some(waiting)} got no further in {stuck[waiting[0]].seconds:.0f} s"
        )
        if late:
            return (
                f"{told}, and ranks {_some(late)} never came to it: they keep the others waiting."
            )
        return (
            f"{told}. Messages do not arrive: see that the ranks reach each other "
            "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME: by which network; NCCL_DEBUG=INFO says more)."
        )

    def _slow_links(self) -> list[str]:
        found = []
        for within in (True, False):
            links = [link for link in self.links if link.within is within]
            if len(links) < 3:
                continue
            if within and self.answered[0].about["device type"] == "cpu":
                continue  # memory, whose rate says more about who else computes there
            usual = median(link.rate for link in links)
            for link in links:
                if link.rate < SLOW * usual:
                    found.append(
                        f"the link between ranks {link.ranks[0]} and {link.ranks[1]} moves "
                        f"{link.rate / 1e9:.2f} GB/s, others like it {usual / 1e9:.2f}: look at "
                        "that cable, card or node, or leave it out."
                    )
        return found

    def told(self) -> dict[str, Any]:
        """All of it, for a program."""
        return {
            "right": not self.sentences(),
            "sentences": self.sentences(),
            "ranks": [None if rank is None else asdict(rank) for rank in self.ranks],
        }


def _hangs(rank: RankReport) -> bool:
    return bool(rank.outcomes) and rank.outcomes[-1].state == NO_ANSWER


def _of_check(check: str, outcomes: list[tuple[int, Outcome]]) -> list[str]:
    """A sentence for each thing that went wrong in a check, by the ranks on which it did."""
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, outcome in outcomes:
        if outcome.state in (WRONG, RAISED):
            ranks.setdefault((outcome.state, outcome.said), []).append(rank)
    what = {
        "backend": "Name another backend= until it is mended, and report it with `usp info`.",
        "messages": "torch.distributed itself is at fault here: another version of its library, or "
        "NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1, tells whose fault it is.",
    }
    advice = what.get(check.split()[0], "Report it with `usp info` and this output.")
    return [
        f"{check}, ranks {_some(where)}: {state}, {said.rstrip('.')}. {advice}"
        for (state, said), where in ranks.items()
    ]


def _some(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"

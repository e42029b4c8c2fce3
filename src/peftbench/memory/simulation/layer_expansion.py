"""Extrapolate the events of a model with few equal units of layers to those of a model with any number of them.

A step passes over the layers several times: in the forward pass, in the backward pass, and in an optimizer that updates
one parameter after another. In each pass over four units, the events of unit 2 follow those of unit 1, or vice
versa. They are repeated, with storages of their own, for each unit that was not simulated. All other events are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from peftbench.profiler.memory_breakdown import MemoryEvent

NUM_UNITS = 4
"""Units of the model whose events are extrapolated."""
_FIRST, _LOWER, _REPEATED, _LAST = range(NUM_UNITS)
"""Tags of the units. Unit 2 is repeated."""


class UnequalLayersError(Exception):
    """The events do not repeat from unit to unit."""


def extrapolate_events(
    events: Sequence[MemoryEvent], events_of_three: Sequence[MemoryEvent], num_units: int
) -> list[MemoryEvent]:
    """Return the events of a model with ``num_units`` units from those of models with four and with three units.

    Events outside of layers may have sizes that grow linearly with the number of units.

    Raises:
        UnequalLayersError: the events of four units, reduced to three, are not those of the model with three.
    """
    runs = _group_by_unit(events)
    growth = _compare_with_three_units(_Extrapolation(runs, NUM_UNITS - 1).build(), events_of_three)
    expanded = _Extrapolation(runs, num_units).build()
    added = num_units - NUM_UNITS
    return [
        event._replace(nbytes=event.nbytes + added * growth[id(source)]) if id(source) in growth else event
        for event, source in expanded
    ]


def _compare_with_three_units(
    reduced: Sequence[tuple[MemoryEvent, MemoryEvent]], events_of_three: Sequence[MemoryEvent]
) -> dict[int, int]:
    """Return how many bytes per unit an event grows, by the id of the event of four units; only those that grow."""
    if len(reduced) != len(events_of_three):
        raise UnequalLayersError(f"{len(reduced)} events instead of {len(events_of_three)}")
    growth = {}
    for (event, source), expected in zip(reduced, events_of_three, strict=True):
        if event._replace(nbytes=expected.nbytes, layer=expected.layer) != expected:
            raise UnequalLayersError(f"{event} instead of {expected}")
        if event.nbytes != expected.nbytes:
            if source.layer is not None:
                raise UnequalLayersError(f"the size of a layer's storage depends on the number of layers: {event}")
            growth[id(source)] = event.nbytes - expected.nbytes
    return growth


class _Place(NamedTuple):
    """A storage that a unit allocates in a pass."""

    kind: int
    """Number of the allocation, the same in all units, from its pass, place, size, category and operation."""
    unit: int


@dataclass
class _Run:
    """Consecutive events of one unit, or of none."""

    unit: int | None
    events: list[MemoryEvent]

    @property
    def is_middle(self) -> bool:
        """True if it is a run of one of the units between the first and the last."""
        return self.unit in (_LOWER, _REPEATED)


def _group_by_unit(events: Sequence[MemoryEvent]) -> list[_Run]:
    """Group events by the unit that runs, or by the unit of the storage where none runs.

    Events between the runs of two neighbors belong to no unit. Events without a unit between two runs of the same
    middle unit belong to it.
    """
    owners = {event.storage_id: event.layer for event in events if event.is_allocation}
    merged: list[_Run] = []
    for run in _assign_lone_releases(_split_by_unit(events, [event.layer for event in events]), owners):
        if run.is_middle and len(merged) >= 2 and merged[-1].unit is None and merged[-2].unit == run.unit:
            gap = merged.pop()
            merged[-1].events += gap.events + run.events
        elif merged and merged[-1].unit == run.unit:
            merged[-1].events += run.events
        else:
            merged.append(run)
    return merged


def _assign_lone_releases(runs: list[_Run], owners: dict[int, int | None]) -> list[_Run]:
    """Split runs without a unit by the units of their storages, except in a middle unit and between neighbors."""
    assigned: list[_Run] = []
    for index, run in enumerate(runs):
        before = runs[index - 1].unit if index else None
        after = runs[index + 1].unit if index + 1 < len(runs) else None
        if run.unit is not None or _is_gap(before, after):
            assigned.append(run)
        else:
            assigned += _split_by_unit(run.events, [owners[event.storage_id] for event in run.events])
    return assigned


def _is_gap(before: int | None, after: int | None) -> bool:
    """True for events inside a middle unit or between two neighbors."""
    if before is None or after is None:
        return False
    return abs(before - after) == 1 or (before == after and before in (_LOWER, _REPEATED))


def _split_by_unit(events: Sequence[MemoryEvent], units: Sequence[int | None]) -> list[_Run]:
    runs: list[_Run] = []
    for event, unit in zip(events, units, strict=True):
        if runs and runs[-1].unit == unit:
            runs[-1].events.append(event)
        else:
            runs.append(_Run(unit, [event]))
    return runs


def _find_last_unit(neighbors: Sequence[_Run]) -> list[MemoryEvent]:
    """Return the events of the last unit next to a pass: the repeated unit may release its storages."""
    for run in neighbors:
        if run.unit is not None:
            return run.events if run.unit == _LAST else []
    return []


def _count_allocations(events: Sequence[MemoryEvent]) -> int:
    return sum(event.is_allocation for event in events)


class _Extrapolation:
    """Builds the events of a model with ``num_units`` units from the runs of a model with four.

    A storage of a middle unit is identified by its kind and the unit of the result, any other storage by its number in
    the input.
    """

    def __init__(self, runs: list[_Run], num_units: int) -> None:
        self._runs, self._num_units = runs, num_units
        self._copies = range(_REPEATED, num_units - 1)
        """Units of the result that repeat unit 2."""
        self._output: list[tuple[MemoryEvent, MemoryEvent]] = []
        """Events of the result, each with the event that it repeats."""
        self._kinds: dict[tuple[object, ...], int] = {}
        self._places: dict[int, _Place] = {}
        """By storage of the input, if a middle or the last unit allocates it in a pass."""
        self._storages_of_last: dict[int, int] = {}
        """Storage of the last unit by its kind."""
        self._numbers: dict[int, int] = {}
        """Number of each storage of the result."""
        self._last_unit: int | None = None
        """The unit that ran last."""

    def build(self) -> list[tuple[MemoryEvent, MemoryEvent]]:
        """Return the events, each with the event that it repeats.

        Raises:
            UnequalLayersError: a middle unit has events that its neighbor lacks.
        """
        index = layer_pass = 0
        while index < len(self._runs):
            distance = self._find_neighbor(index)
            if distance is None:
                self._emit_run(self._runs[index])
                index += 1
            else:
                index = self._emit_pass(index, distance, layer_pass)
                layer_pass += 1
        return self._output

    def _emit_run(self, run: _Run) -> None:
        if run.unit is not None and run.events[0].layer is not None:
            self._last_unit = run.unit
        if run.is_middle and not self._is_edge(run):
            raise UnequalLayersError(f"events of unit {run.unit} without those of its neighbor: {run.events[0]}")
        self._emit(run.events, run.unit)

    def _is_edge(self, run: _Run) -> bool:
        """True if the run only releases storages of a middle unit after the unit at that end of the model ran."""
        neighbor = _FIRST if run.unit == _LOWER else _LAST
        return self._last_unit == neighbor and all(
            event.layer is None and not event.is_allocation for event in run.events
        )

    def _find_neighbor(self, index: int) -> int | None:
        """Return how many runs after ``index`` the other middle unit follows, None if no pass starts here."""
        if not self._runs[index].is_middle:
            return None
        neighbor = _LOWER + _REPEATED - (self._runs[index].unit or 0)
        following = [run.unit for run in self._runs[index + 1 : index + 3]]
        if following[:1] == [neighbor]:
            return 1
        return 2 if following == [None, neighbor] else None

    def _emit_pass(self, index: int, distance: int, layer_pass: int) -> int:
        """Emit the middle units of a pass, each with the gap to the next unit; return the index of the next run."""
        is_ascending = self._runs[index].unit == _LOWER
        first = [event for run in self._runs[index : index + distance] for event in run.events]
        second = self._runs[index + distance].events
        end = index + distance + 1
        if [run.unit for run in self._runs[end : end + 2]] == [None, _LAST if is_ascending else _FIRST]:
            second = second + self._runs[end].events
            end += 1
        lower, repeated = (first, second) if is_ascending else (second, first)
        neighbors = self._runs[end : end + 2] if is_ascending else self._runs[max(0, index - 2) : index][::-1]
        last = _find_last_unit(neighbors)
        # A last unit with more layers than the others has additional allocations at the end of the model.
        added = 0 if is_ascending else _count_allocations(last) - _count_allocations(repeated)
        self._register(last, layer_pass, _LAST, first_ordinal=-added)
        self._register(lower, layer_pass, _LOWER)
        self._register(repeated, layer_pass, _REPEATED)
        if is_ascending:
            self._emit(lower, _LOWER)
            self._emit_copies(repeated, self._copies)
        else:
            self._emit_copies(repeated, self._copies[::-1])
            self._emit(lower, _LOWER)
        return end

    def _register(self, events: Sequence[MemoryEvent], layer_pass: int, unit: int, *, first_ordinal: int = 0) -> None:
        """Register the storages that a unit allocates in a pass; equal ones of all units have the same ordinal."""
        for ordinal, event in enumerate((event for event in events if event.is_allocation), first_ordinal):
            signature = (layer_pass, ordinal, event.nbytes, event.category, event.operation)
            place = _Place(self._kinds.setdefault(signature, len(self._kinds)), unit)
            self._places[event.storage_id] = place
            if unit == _LAST:
                self._storages_of_last[place.kind] = event.storage_id

    def _emit(self, events: Sequence[MemoryEvent], unit: int | None) -> None:
        """Emit events that are not repeated."""
        for event in events:
            place = self._places.get(event.storage_id)
            if place is None or place.unit == _LAST:
                key = -1 - event.storage_id
            elif place.unit == _LOWER:
                key = self._find_key(place.kind, _LOWER)
            else:  # the unit above the second one, or the unit below the last one
                key = self._find_key(place.kind, _REPEATED if unit == _LOWER else self._num_units - 2)
            self._append(key, event)

    def _emit_copies(self, events: Sequence[MemoryEvent], copies: Sequence[int]) -> None:
        """Emit the events of the repeated unit for each of ``copies``."""
        if not copies:
            return
        places = [self._places.get(event.storage_id) for event in events]
        for copy in copies:
            for event, place in zip(events, places, strict=True):
                if place is None:
                    raise UnequalLayersError(f"a middle unit releases a storage of the first or last unit: {event}")
                kind, unit = place
                self._append(self._find_key(kind, copy + unit - _REPEATED), event)

    def _find_key(self, kind: int, unit: int) -> int:
        """Return the key of the storage of this kind of a unit of the result."""
        if unit < self._num_units - 1:
            return kind * self._num_units + unit
        if kind not in self._storages_of_last:
            raise UnequalLayersError("the last unit lacks a storage that its neighbor has")
        return -1 - self._storages_of_last[kind]

    def _append(self, key: int, event: MemoryEvent) -> None:
        number = self._numbers.get(key)
        if event.is_allocation == (number is not None):
            problem = "allocated twice" if event.is_allocation else "released before it is allocated"
            raise UnequalLayersError(f"a storage is {problem}: {event}")
        if number is None:
            number = self._numbers[key] = len(self._numbers)
        self._output.append((MemoryEvent(number, *event[1:]), event))

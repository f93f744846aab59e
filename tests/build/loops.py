# SPDX-License-Identifier: Apache-2.0
"""Loops of a kernel and what an iteration costs: instructions, bytes, loads in flight.

A loop is a set of blocks that reach one another; without the way back to its first block it falls
apart into the loops inside it. Of the ways through an iteration the one that moves the most bytes
is looked at, and of these the shortest: where the code chooses between packs and single elements,
and where a slow case is seldom, that is the way a large aligned call takes. Loops inside count
once, and so does what is called.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from build.sass import Function, Instruction

Graph = dict[int, list[int]]


@dataclass
class Loop:
    """One loop.

    Attributes:
        depth: 1 for a loop in no other.
        blocks: numbers of its own blocks, without those of loops inside.
        path: instructions of an iteration, in order.
        beside: how many more run in loops inside, once each, and in functions that are called.
        accesses: to global memory, on every way through its own blocks.
        inside: loops directly inside.
    """

    depth: int
    blocks: list[int]
    path: list[Instruction] = field(default_factory=list)
    beside: int = 0
    accesses: list[Instruction] = field(default_factory=list)
    inside: list[Loop] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes of global memory that a thread moves in an iteration."""
        return sum(i.width for i in self.path)

    @property
    def instructions(self) -> int:
        """Instructions that a thread issues in an iteration."""
        return len(self.path) + self.beside

    @property
    def source(self) -> str:
        """The line that moves the most, else the first known one."""
        moved: dict[str, int] = {}
        for i in self.path:
            moved[i.source] = moved.get(i.source, 0) + i.width
        return max(moved, key=lambda s: (s != "", moved[s]), default="")

    @property
    def in_flight(self) -> tuple[int, int]:
        """Most global loads that wait for their data at once, and their bytes, of one thread."""
        return _in_flight(self.path)


def find(function: Function) -> list[Loop]:
    """The loops in no other loop that the entry can reach."""
    graph = _reachable(function, 0)
    return _inside(function, graph, list(graph), 1)


def straight(function: Function) -> Loop:
    """All that a thread runs, seen as one iteration: for kernels whose loop is the grid."""
    graph = _reachable(function, 0)
    loop = Loop(0, sorted(graph), inside=find(function))
    taken = {b for each in every(loop.inside) for b in each.blocks}
    loop.blocks = sorted(set(graph) - taken)
    _measure(function, loop, graph, 0, {b for b in graph if not graph[b]})
    return loop


def every(loops: Iterable[Loop]) -> list[Loop]:
    """Loops and those inside, outer ones first."""
    return [each for loop in loops for each in (loop, *every(loop.inside))]


def main(loops: Iterable[Loop]) -> Loop | None:
    """Of the loops that move bytes the deepest, which runs most often; of these the largest."""
    found = [x for x in every(loops) if x.bytes]
    return max(found, key=lambda x: (x.depth, x.bytes), default=None)


def _reachable(function: Function, start: int) -> Graph:
    graph: Graph = {}
    todo = [start]
    while todo:
        block = todo.pop()
        if block not in graph:
            graph[block] = function.blocks[block].next
            todo += graph[block]
    return graph


def _inside(function: Function, graph: Graph, nodes: list[int], depth: int) -> list[Loop]:
    found = []
    for parts in _components(graph, nodes):
        members = set(parts)
        if len(parts) == 1 and parts[0] not in graph[parts[0]]:
            continue
        entered = {s for n in graph if n not in members for s in graph[n] if s in members}
        head = min(entered or members)
        inner = {n: [s for s in graph[n] if s in members and s != head] for n in parts}
        inside = _inside(function, inner, parts, depth + 1)
        taken = {b for loop in every(inside) for b in loop.blocks}
        loop = Loop(depth, sorted(members - taken), inside=inside)
        latches = {n for n in parts if head in graph[n]}
        _measure(function, loop, inner, head, latches)
        found.append(loop)
    return sorted(found, key=lambda x: x.blocks)


def _components(graph: Graph, nodes: list[int]) -> list[list[int]]:
    """Strongly connected components (Tarjan), those that are reached last come first."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found: list[list[int]] = []
    for root in nodes:
        if root in index:
            continue
        work = [(root, iter(graph[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, following = work[-1]
            for s in following:
                if s not in index:
                    index[s] = low[s] = len(index)
                    stack.append(s)
                    on_stack.add(s)
                    work.append((s, iter(graph[s])))
                    break
                if s in on_stack:
                    low[node] = min(low[node], index[s])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    at = stack.index(node)
                    found.append(stack[at:])
                    on_stack.difference_update(stack[at:])
                    del stack[at:]
    return found


def _measure(function: Function, loop: Loop, inner: Graph, head: int, latches: set[int]) -> None:
    """Fills in the accesses and the path of one iteration."""
    for number in loop.blocks:
        for i in function.blocks[number].code:
            if i.width:
                loop.accesses.append(i)
    # A loop inside is passed as one step, which moves nothing: its bytes are its own.
    owner = {b: at for at, each in enumerate(loop.inside) for x in every([each]) for b in x.blocks}

    def cost(step: tuple[int, ...]) -> tuple[int, int]:
        code = [i for b in step for i in function.blocks[b].code]
        called = sum(_called(function, i) for i in code)
        if step[0] in owner:
            inside = loop.inside[owner[step[0]]]
            return 0, inside.instructions
        return sum(i.width for i in code), len(code) + called

    # Components come in an order in which all that follows a step is done before it.
    best: dict[int, tuple[int, int, list[int]]] = {}  # block -> bytes, -instructions, way to latch
    for step in _components(inner, [head]):
        moved, issued = cost(tuple(step))
        members = set(step)
        ways = [best[s] for b in step for s in inner[b] if s not in members and s in best]
        if members & latches:
            ways.append((0, 0, []))
        if not ways:
            continue
        rest = max(ways, key=lambda w: w[:2])
        here = [] if step[0] in owner else step
        for b in step:
            best[b] = (rest[0] + moved, rest[1] - issued, [*here, *rest[2]])
    way = best[head]
    loop.path = [i for b in way[2] for i in function.blocks[b].code]
    loop.beside = -way[1] - len(loop.path)


def _called(function: Function, call: Instruction) -> int:
    """Instructions of the shortest way through a function that is called; 0 of others."""
    if call.kind != "CALL" or not call.targets or call.targets[0] not in function.labels:
        return 0
    start = function.labels[call.targets[0]]
    lengths = {start: len(function.blocks[start].code)}
    todo = [start]
    ends = []
    while todo:
        block = min(todo, key=lambda b: lengths[b])
        todo.remove(block)
        if not function.blocks[block].next:
            ends.append(lengths[block])
        for s in function.blocks[block].next:
            length = lengths[block] + len(function.blocks[s].code)
            if length < lengths.get(s, 1 << 30):
                lengths[s] = length
                todo.append(s)
    return min(ends, default=0)


def _in_flight(path: list[Instruction]) -> tuple[int, int]:
    """Walks through two iterations: a load waits until something reads or overwrites its result."""
    waiting: dict[int, Instruction] = {}  # number of the load -> load
    groups: list[list[int]] = [[]]  # asynchronous copies: closed groups, then the open one
    most, widest, number = 0, 0, 0
    for i in (*path, *path):
        touched = i.reads | i.writes
        for load in [n for n, w in waiting.items() if w.writes & touched]:
            del waiting[load]
        if i.kind == "LDGDEPBAR":
            groups.append([])
        elif i.kind == "DEPBAR" and (left := i.operands.rpartition(",")[2].strip()):
            keep = int(left, 0) if left.startswith("0x") else 0
            done = groups[: max(0, len(groups) - 1 - keep)]
            for load in (n for group in done for n in group):
                waiting.pop(load, None)
            groups = groups[len(done) :]
        elif i.loads:
            waiting[number] = i
            if i.kind == "LDGSTS":
                groups[-1].append(number)
            number += 1
            size = sum(w.width for w in waiting.values())
            most, widest = max(most, len(waiting)), max(widest, size)
    return most, widest

"""The sections of a page, from the documents that `--json` prints; docs/json.md describes their keys."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.texts import format_bytes
from trtllm_ct.cli.folding import fold_names
from trtllm_ct.cli.page.markup import bars, bullets, bytes_of, count_of, section, table, text
from trtllm_ct.engine.platform import sms_in_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from trtllm_ct.plan.plan import ModulePlan

__all__ = ["dequantized_texts", "elsewhere", "first", "gpus", "header", "parts", "schemes"]

Document = dict[str, Any]


def header(name: str, verdict: str, facts: Iterable[str]) -> str:
    """Return the beginning of a page: what it is about, the verdict in one sentence, and facts in a line each."""
    lines = "".join(f"<p class=facts>{text(fact)}</p>" for fact in facts if fact)
    return f"<h1>{text(name)}</h1><p class=verdict>{text(verdict)}</p>{lines}\n"


def first(document: Mapping[str, Any], dequantized: Iterable[str] = (), *, faults: str = "problems") -> str:
    """Return the section of what to know first: problems, dequantized modules, deviations and warnings.

    `faults` is the key of problems in the document.
    """
    found = [
        f"<strong class=bad-text>{text(fault['where'])}</strong>: expected {text(fault['expected'])}; found "
        f"{text(fault['found'])}. {text(fault['remedy'])}"
        for fault in document[faults]
    ]
    deviations = [
        f"{entry['modules']:,} modules ({text(entry['mode'])}) are computed otherwise: {text(entry['note'])}"
        for entry in document.get("deviations", ())
    ]
    others = [*map(text, dequantized), *deviations, *map(text, document["warnings"])]
    kind = " bad" if found else "" if others else " good"
    body = bullets([*found, *others]) or "<p>Nothing deviates, and there are no warnings.</p>"
    return section("What to know first", f"<div class='first{kind}'>{body}</div>")


def dequantized_texts(modules: Sequence[ModulePlan]) -> Iterator[str]:
    """Yield a text for each reason why modules are dequantized, those that grow most first."""
    growth: Counter[str] = Counter()
    groups: dict[str, list[ModulePlan]] = {}
    for module in modules:
        if module.dequantized:
            growth[module.reason] += module.delivered_bytes - module.stored_bytes
            groups.setdefault(module.reason, []).append(module)
    for reason, _ in growth.most_common():
        now, after = (
            format_bytes(sum(getattr(module, f"{when}_bytes") for module in groups[reason]))
            for when in ("stored", "delivered")
        )
        why = reason or "the target is plain"
        yield f"{len(groups[reason]):,} modules are dequantized, {now} become {after}: {why}"


def parts(document: Mapping[str, Any]) -> str:
    """Return the section of bytes by kind of module, with bars."""
    entries = document["parts"]
    most = max((max(part["stored_bytes"], part["delivered_bytes"]) for part in entries), default=0) or 1
    rows: list[tuple[str, ...]] = [
        (
            text(part["kind"]),
            bars(100 * part["stored_bytes"] / most, 100 * part["delivered_bytes"] / most),
            count_of(part["modules"], f"parts.{at}.modules"),
            bytes_of(part["stored_bytes"], f"parts.{at}.stored_bytes"),
            bytes_of(part["delivered_bytes"], f"parts.{at}.delivered_bytes"),
        )
        for at, part in enumerate(entries)
    ]
    if not rows:
        return ""
    whole = (bytes_of(document[key], key) for key in ("stored_bytes", "delivered_bytes"))
    rows.append(("all", "", count_of(sum(part["modules"] for part in entries)), *whole))
    headers = ("kind", "share", "modules", "on disk", "in the engine")
    note = "The upper bar is on disk, the lower one in the engine."
    return section("Where the bytes are", table("Bytes by kind of module", headers, rows, numbers=3), note=note)


def gpus(document: Mapping[str, Any]) -> str:
    """Return the section of what one GPU needs at common tensor-parallel sizes, and what is left of it."""
    entries = document["gpus"]
    if not entries:
        return ""
    memories = [room["gpu"] for room in entries[0]["rooms"]]
    headers = ("GPUs", "dequantized", "weights", "1,000 tokens")
    rows = [
        (
            f"tp {entry['tensor']}",
            count_of(entry["dequantized"], f"gpus.{at}.dequantized"),
            bytes_of(entry["weights"], f"gpus.{at}.weights"),
            bytes_of(entry["kv_cache"], f"gpus.{at}.kv_cache"),
            *(_room(room, f"gpus.{at}.rooms.{index}") for index, room in enumerate(entry["rooms"])),
        )
        for at, entry in enumerate(entries)
    ]
    titles = (*headers, *(f"left of {gpu // 10**9} GB" for gpu in memories))
    found = table("What one GPU needs, and what is left of it", titles, rows, numbers=len(titles) - 1)
    by_reason: dict[str, list[str]] = {}
    for entry in entries:
        by_reason.setdefault(entry["reason"], []).append(str(entry["tensor"]))
    reasons = bullets(f"tp {', '.join(sizes)}: {text(reason)}" for reason, sizes in by_reason.items() if reason)
    note = (
        "Bytes of one GPU: the weights of its rank, the KV cache of 1,000 tokens, and what is left beside the weights, "
        "with the tokens that fit into it. Activations, workspaces and what the driver takes are not counted."
    )
    return section("Per GPU", found + reasons, note=note)


def _room(room: Mapping[str, Any], key: str) -> str:
    """Return what is left of a GPU, and the tokens whose cache fits into it."""
    left = room["left"]
    if left is None:
        return "unknown"
    if left < 0:
        return (
            f'<span class=no-fit><data value="{left}" data-key="{key}.left">{format_bytes(-left)}</data> short</span>'
        )
    shown = bytes_of(left, f"{key}.left")
    if room["tokens"] is None:
        return shown
    return f"{shown}<br><small>{count_of(room['tokens'], f'{key}.tokens', short=True)} tokens</small>"


def elsewhere(document: Mapping[str, Any], sentence: str) -> str:
    """Return the section of other releases and GPUs under this sentence; empty if they were not compared."""
    rows = [
        (
            text(served["engine"]),
            sms_in_words([served["sm"]] if served["sm"] else served["sms"]) or "none",
            f"{count_of(served['kept'], f'elsewhere.{at}.kept')} of {served['quantized']:,}",
            count_of(served["deviating"], f"elsewhere.{at}.deviating"),
            bytes_of(served["delivered_bytes"], f"elsewhere.{at}.delivered_bytes"),
            count_of(served["problems"], f"elsewhere.{at}.problems"),
        )
        for at, served in enumerate(document["elsewhere"] or ())
    ]
    headers = ("release", "GPUs", "keep their codes", "computed otherwise", "bytes", "problems")
    return section("Elsewhere", table("Releases and GPUs", headers, rows, numbers=4) if rows else "", note=sentence)


def schemes(document: Mapping[str, Any]) -> str:
    """Return the section of modules by scheme, with names folded over layers and experts."""
    rows = [
        (
            "<br>".join(map(text, fold_names(scheme["modules"]))),
            text(scheme["scheme"]),
            text(scheme["native_mode"]),
            text(scheme["mode"]),
            text("; ".join(filter(None, (scheme["reason"], scheme["note"])))),
            count_of(len(scheme["modules"])),
            bytes_of(scheme["stored_bytes"], f"schemes.{at}.stored_bytes"),
            bytes_of(scheme["delivered_bytes"], f"schemes.{at}.delivered_bytes"),
        )
        for at, scheme in enumerate(document["schemes"])
    ]
    headers = ("modules", "stored", "scheme family", "in the engine", "why", "number", "on disk", "in the engine")
    return section("Schemes", table("Modules by scheme", headers, rows, numbers=3) if rows else "")

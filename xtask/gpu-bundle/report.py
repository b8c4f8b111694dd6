"""The result file: markdown, whole after every row."""

import os


def write(path, facts, rows):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text(facts, rows))
    os.replace(temporary, path)


def text(facts, rows):
    where = facts.get("GPU", "the CPU: a rehearsal, which says nothing of a GPU")
    lines = [f"# aha on {where}", ""]
    lines += table(["", ""], [[name, value] for name, value in facts.items()])
    lines += ["", "## Correctness", "", correctness(rows), ""]
    checks = [row for row in rows if row.get("correctness")]
    lines += table(
        ["part", "check", "", "seconds", ""],
        [[row["part"], row["name"], row["status"], number(row.get("seconds"), 1), row["detail"]] for row in checks],
    )
    lines += ["", "## Training", ""] + training([row for row in rows if row["part"] == "train"])
    lines += ["", "## One process", ""] + colocated([row for row in rows if row["part"] == "colocate"])
    lines += ["", "## Decoding", ""] + decoding([row for row in rows if row["part"] == "decode"])
    logs = [row for row in rows if row.get("log")]
    if logs:
        lines += ["", "## What was said where it failed"]
    for row in logs:
        lines += ["", f"{row['part']}: {row['name']}: {row['status']}, {row['detail']}", "", "```", row["log"], "```"]
    return "\n".join(lines) + "\n"


def correctness(rows):
    checks = [row for row in rows if row.get("correctness")]
    wrong = [row for row in checks if row["status"] != "ok"]
    if not wrong:
        return f"All {len(checks)} checks held."
    return f"**{len(wrong)} of {len(checks)} checks did not hold** or were not reached."


def training(rows):
    done = [row for row in rows if row["status"] == "ok"]
    cells = []
    for row in done:
        measured = row["measured"]
        whole = sum(measured["ms_of_parts"].values())
        parts = [f"{name} {100 * ms / whole:.0f}" for name, ms in measured["ms_of_parts"].items() if ms > whole / 200]
        cells.append([
            row["shape"],
            row["options"],
            number(measured["tokens_per_second"], 0),
            number(measured["seconds_per_step"], 3),
            number(measured["tflops"], 1),
            number(measured["mfu_percent"], 1),
            number(measured["mfu_with_attention_percent"], 1),
            ", ".join(parts),
            number(measured["peak_bytes"] and measured["peak_bytes"] / 2**30, 1),
        ])
    lines = []
    if done:
        lines += ["Random weights and ragged lengths, one rank. Operations are 6 a token and parameter, without recomputation.", ""]
        heads = ["shape", "options", "tokens/s", "s a step", "TFLOP/s", "MFU %", "with attention", "% of the time", "peak GiB"]
        lines += table(heads, cells)
    others = [f"- {row['name']}: {row['status']}: {row['detail']}" for row in rows if row["status"] != "ok"]
    return lines + ([""] if lines and others else []) + others if lines or others else ["Nothing was measured."]


def colocated(rows):
    done = [row for row in rows if row["status"] == "ok"]
    cells = []
    for row in done:
        measured = row["measured"]
        seconds = ["generate", "sleep", "train", "push", "swap"]
        memory = ["awake", "asleep", "trained", "awake_again"]
        cells.append([row["shape"], row["options"], measured["batch"], measured["new_tokens"]]
                     + [number(measured[f"{name}_seconds"], 3) for name in seconds]
                     + [number(measured[f"{name}_bytes"] and measured[f"{name}_bytes"] / 2**30, 2) for name in memory])
    lines = []
    if done:
        lines += ["Steps of random weights with the engine in the trainer's process. Seconds, then GiB that are taken.", ""]
        heads = ["shape", "options", "batch", "new tokens", "generate", "sleep", "train", "push", "of it swap"]
        lines += table(heads + ["awake", "asleep", "trained", "awake again"], cells)
    others = [f"- {row['name']}: {row['status']}: {row['detail']}" for row in rows if row["status"] != "ok"]
    return lines + ([""] if lines and others else []) + others if lines or others else ["Nothing was measured."]


def decoding(rows):
    done = [row for row in rows if row["status"] == "ok"]
    peers = {(row["shape"], row["batch"]): row["measured"] for row in done if row["engine"] == "hf"}
    own = [row for row in done if row["engine"] == "aha"]
    cells = []
    for row in sorted(own, key=lambda row: (row["shape"], row["batch"])):
        measured, peer = row["measured"], peers.get((row["shape"], row["batch"]))
        rate = measured["tokens_per_second"]
        cells.append([
            row["shape"],
            row["batch"],
            number(rate, 0),
            number(measured["ms_per_step"], 3),
            number(measured["percent_of_roofline"], 1),
            number(peer["tokens_per_second"], 0) if peer else "",
            number(rate / peer["tokens_per_second"], 2) if peer else "",
        ])
    lines = []
    if own:
        measured = own[0]["measured"]
        lines += [
            f"Random weights; prefill is in the time and not in the roofline, which is {measured['bandwidth_gbs']:.0f} GB/s"
            f" ({measured['bandwidth_source']}).",
            "",
        ]
        heads = ["shape", "batch", "tokens/s", "ms a step", "% of the roofline", "transformers tokens/s", "ratio"]
        lines += table(heads, cells)
    lonely = [row for row in done if row["engine"] == "hf" and not any(
        (row["shape"], row["batch"]) == (other["shape"], other["batch"]) for other in own)]
    others = [f"- {row['name']}: {row['detail']}" for row in lonely]
    others += [f"- {row['name']}: {row['status']}: {row['detail']}" for row in rows if row["status"] != "ok"]
    return lines + ([""] if lines and others else []) + others if lines or others else ["Nothing was measured."]


def table(heads, rows):
    line = lambda cells: "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    return [line(heads), "|" + "---|" * len(heads), *map(line, rows)]


def number(value, digits):
    return "" if value is None else f"{value:,.{digits}f}"

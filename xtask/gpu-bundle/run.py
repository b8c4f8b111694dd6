#!/usr/bin/env python3
"""Checks and measures aha on a GPU host, and writes one result file.

Needs Python with torch 2.11 installed (its libraries are used, the module is not imported) and nothing else. Every part
has a time limit; what fails is recorded and does not stop the others; what is done is on disk at once. Exits with 0 if
all that was computed is correct, with 1 if something is not or was not reached, with 2 if this machine cannot run it.
"""

import argparse
import json
import math
import socket
import sys
from pathlib import Path

import host
import report
from process import Clock, start, stop, tail

BUNDLE = Path(__file__).resolve().parent
# Most important first: where the time runs out, the last are left out. `aha` is this engine, `hf` transformers.
MEASUREMENTS = [
    ("aha", "qwen2.5-0.5b", 256),
    ("aha", "qwen2.5-1.5b", 256),
    ("hf", "qwen2.5-0.5b", 256),
    ("aha", "qwen2.5-0.5b", 512),
    ("aha", "qwen2.5-0.5b", 64),
    ("aha", "qwen2.5-3b", 256),
    ("aha", "qwen2.5-7b", 256),
    ("hf", "qwen2.5-1.5b", 256),
    ("aha", "qwen2.5-0.5b", 128),
    ("aha", "qwen2.5-1.5b", 512),
    ("aha", "qwen2.5-1.5b", 64),
    ("aha", "qwen2.5-1.5b", 128),
    ("aha", "qwen2.5-3b", 512),
    ("aha", "qwen2.5-3b", 64),
    ("aha", "qwen2.5-3b", 128),
    ("aha", "qwen2.5-7b", 64),
    ("aha", "qwen2.5-7b", 128),
    ("aha", "qwen2.5-7b", 512),
]
MEASURE_LIMIT = 75
# Training steps at 16,384 tokens a micro-batch, with what makes the shape fit 80 GB, and seconds.
TRAINING = [
    ("qwen2.5-0.5b", [], 60),
    ("qwen2.5-1.5b", ["--gradient-checkpointing-interval", 2], 60),
    ("qwen2.5-3b", ["--gradient-checkpointing-interval", 1], 75),
    ("qwen2.5-7b", ["--gradient-checkpointing-interval", 1, "--offload-optimizer", "--steps", 1], 120),
]
# GRPO steps with the engine in the trainer's process, with what makes the shape fit, and seconds.
COLOCATED = [
    ("qwen2.5-0.5b", [], 60),
    ("qwen2.5-1.5b", ["--gradient-checkpointing-interval", 1], 75),
    ("smollm2-135m", [], 45),
    ("countdown-tiny", [], 30),
]
COLOCATED_BATCH = 256
# Dense operations of bf16 by data sheet, in 10^12 a second.
PEAK_TFLOPS = [("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989), ("H200", 989), ("A100", 312)]
# What is checked first: the layouts of the tensor cores' fragments are known from no run.
KERNEL_TESTS = [
    ("decode attention against f64", "kernels::cuda::attention::tests::decoding_agrees_with_f64"),
    ("attention", "kernels::cuda::attention::"),
    ("rotary positions and the cache", "kernels::cuda::rope::"),
    ("embedding, norm, SwiGLU", "kernels::cuda::elementwise::"),
    ("sampling", "kernels::cuda::sampling::"),
    ("advancing rows", "kernels::cuda::step::"),
    ("the trainer's kernels", "kernels::cuda::training::"),
    ("a layer by the trainer's kernels", "autograd_ops::"),
    ("the head by the trainer's kernels", "logprob::"),
    ("the trainer's flash attention against f64", "varlen_attention::tests::flash_attention_on_a_gpu_equals_the_formula"),
]
PARITY_TESTS = [
    ("trainer against transformers", "parity", ["the_trainers_logprobs_equal_transformers"]),
    ("generator and trainer against the CPU", "parity", ["generator_and_trainer_agree_on_the_device"]),
    (
        "the trainer's step against whole-graph autograd",
        "aha_trainer",
        [
            "torch::tests::whole_graph::the_step_equals_whole_graph_autograd",
            "torch::tests::invariance::recomputing_activations_changes_nothing",
            "torch::tests::invariance::two_runs_are_equal_to_the_last_bit",
            "torch::tests::invariance::a_policy_that_has_not_moved_has_ratio_one",
        ],
    ),
    (
        "the trainer's step by its kernels",
        "aha_trainer",
        [
            "torch::tests::gpu_kernels::the_step_by_the_kernels_of_a_gpu_equals_whole_graph_autograd",
            "torch::tests::gpu_kernels::a_step_in_bf16_by_the_kernels_of_a_gpu_is_as_near_to_fp32_as_libtorchs",
        ],
    ),
    (
        "the trainer's step in bf16 against fp32 on the CPU",
        "aha_trainer",
        ["torch::half_tests::a_step_in_bf16_is_near_the_step_in_fp32_on_the_cpu"],
    ),
]
SUPERVISED_STEPS = 80


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu rehearses it without a GPU")
    parser.add_argument("--minutes", type=float, default=8, help="for everything")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="made here; holds result.md, parts, logs")
    parser.add_argument("--bandwidth-gbs", type=float, help="the memory's, by the data sheet; a copy is measured else")
    parser.add_argument("--peak-tflops", type=float, help="of bf16, by the data sheet; known for some GPUs")
    parser.add_argument("--shapes", type=lambda text: text.split(","), help="only these shapes")
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], help="only these")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--skip", type=lambda text: text.split(","), default=[], help="kernels,parity,grpo,train,colocate,decode")
    return parser.parse_args()


class Run:
    """What the parts share. A row is one line of the result: what it was, how it went, what it measured."""

    def __init__(self, args):
        self.args = args
        self.out = args.out.resolve()
        for folder in ("logs", "tmp"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        self.clock = Clock(args.minutes * 60)
        # Compiled kernels, in TMPDIR, stay from one test program to the next.
        self.environment = {**host.environment(BUNDLE, args.device), "TMPDIR": str(self.out / "tmp")}
        self.facts = {**host.facts(BUNDLE, args.device), "arguments": " ".join(sys.argv[1:])}
        self.rows = []

    def add(self, part, name, status, **measured):
        """Records a row, on disk before anything else happens.

        The status is ok, failed, late, does not fit, skipped or left out.
        """
        row = {"part": part, "name": name, "status": status, **measured}
        self.rows.append(row)
        with open(self.out / "parts.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        report.write(self.out / "result.md", self.facts, self.rows)
        print(f"{self.clock.spent():6.1f} s  {part}: {name}: {status}  {row.get('detail', '')}", flush=True)
        return row

    def command(self, name, command, limit, **options):
        """Runs one command within its limit and the whole's; its output goes to a file of its own."""
        log = self.out / "logs" / f"{name}.log"
        return start([str(word) for word in command], log, self.environment, **options).wait(self.clock.limit(limit))

    def check(self, part, name, command, limit, judge=None):
        """A command whose success is a matter of correctness."""
        if self.clock.is_over():
            return self.add(part, name, "left out", correctness=True, detail="the time was over")
        ended = self.command(f"{part}-{name}".replace(" ", "-").replace("/", "-"), command, limit)
        detail, fine = ended.verdict(), ended.succeeded
        if fine and judge:
            fine, detail = judge(ended)
        status = "ok" if fine else "late" if ended.timed_out else "failed"
        shown = {} if fine else {"log": tail(ended.output, 30)}
        return self.add(part, name, status, correctness=True, seconds=ended.seconds, detail=detail, **shown)


def counted(ended):
    """A test program must have run something: a filter that no longer fits would pass."""
    lines = [line for line in ended.output.splitlines() if line.startswith("test result: ok. ")]
    passed = sum(int(line.split()[3]) for line in lines)
    return passed > 0, f"{passed} tests" if passed else "no test ran"


def kernels(run):
    # One process a group: a kernel that goes astray spoils the GPU for the process that it runs in.
    for index, (name, test) in enumerate(KERNEL_TESTS):
        exact = ["--exact"] if index == 0 else []
        command = [BUNDLE / "bin/aha_nn", test, *exact, "--test-threads", "1"]
        run.check("kernels", name, command, 90, counted)


def parity(run):
    for name, program, tests in PARITY_TESTS:
        run.check("parity", name, [BUNDLE / "bin" / program, *tests, "--exact", "--test-threads", "1"], 90, counted)


def grpo(run):
    folder = run.out / "grpo"
    folder.mkdir(exist_ok=True)
    recipe, device = BUNDLE / "workspace/one-step.yaml", f"model.device={run.args.device}"
    common = [recipe, "--set", device, "--set", f"run.output_dir={folder}"]
    supervised = [BUNDLE / "bin/aha", "sft", *common, "--set", "run.name=supervised", "--set", "model.dtype=float32"]
    supervised += ["--set", f"model.path={BUNDLE / 'workspace/configs/models/countdown-tiny'}"]
    supervised += ["--set", f"train.max_steps={SUPERVISED_STEPS}", "--set", "eval.num_prompts=0"]
    if run.check("grpo", "supervised phase", supervised, 90)["status"] != "ok":
        return
    common += ["--set", f"model.path={folder / 'supervised/model'}", "--set", "model.random_init=false"]
    address = f"127.0.0.1:{free_port()}"
    log = run.out / "logs/grpo-generator.log"
    # Started by hand, for each has a type of its own: the trainer fp32, the generator what its engine is made for.
    generator = start([BUNDLE / "bin/aha", "generator", *common, "--listen", address], log, run.environment)
    try:
        addresses = f'generator.addresses=["{address}"]'
        trainer = [BUNDLE / "bin/aha", "trainer", *common, "--set", "model.dtype=float32", "--set", addresses]
        row = run.check("grpo", "one step", trainer, 120, lambda ended: judge_step(run, folder))
    finally:
        stop(generator)
    if row["status"] != "ok":
        run.add("grpo", "the generator's log", "failed", detail="of the step above", log=tail(log.read_text(), 30))


def judge_step(run, folder):
    lines = (folder / "one-step/metrics.jsonl").read_text().splitlines()
    step = next(metrics for metrics in map(json.loads, lines) if "grad_norm" in metrics)
    difference = step["sampling/sampling_logp_difference/mean"]
    # fp32 on both sides, or bf16 on the generator's.
    allowed = 1e-3 if run.args.device == "cpu" else 0.05
    fine = all(math.isfinite(step[name]) for name in ("loss", "grad_norm", "reward", "kl"))
    fine = fine and step["grad_norm"] > 0 and difference < allowed and (folder / "one-step/summary.json").exists()
    names = ["reward", "grad_norm", "step_time", "weights/push_seconds"]
    shown = ", ".join(f"{name} {step[name]:.4g}" for name in names)
    return fine, f"{shown}, log-prob difference {difference:.2e} (allowed {allowed:g})"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train(run):
    args = run.args
    for shape, options, limit in trainings(args):
        if run.clock.is_over():
            run.add("train", shape, "left out", detail="the time was over")
            continue
        command = [BUNDLE / "bin/aha", "bench", "train", "--model-shape", shape, "--device", args.device, "--json"]
        peak = args.peak_tflops or known_peak(run.facts.get("GPU", ""))
        command += ["--peak-tflops", peak] if peak else []
        ended = run.command(f"train-{shape}", [*command, *options], limit)
        measured = last_json(ended.output) if ended.succeeded else None
        if measured is None:
            # A result as well, and no failure of the rest.
            full = "out of memory" in ended.output.lower()
            status = "late" if ended.timed_out else "does not fit" if full else "failed"
            run.add("train", shape, status, detail=ended.verdict(), log=tail(ended.output, 15))
            continue
        detail = f"{measured['tokens_per_second']:.0f} tokens/s, {measured['tflops']:.1f} TFLOP/s"
        options = " ".join(map(str, options))
        run.add("train", shape, "ok", shape=shape, options=options, measured=measured, detail=detail)


def trainings(args):
    """The chosen ones, and shapes beyond the list; a rehearsal takes steps that a CPU can."""
    known = [shape for shape, _, _ in TRAINING]
    chosen = [row for row in TRAINING if row[0] in (args.shapes or known)]
    chosen += [(shape, [], 120) for shape in args.shapes or [] if shape not in known]
    if args.device == "cuda":
        return chosen
    small = ["--prompt-tokens", 16, "--completion-tokens", "8-48", "--micro-batch-tokens", 128, "--steps", 1]
    # In place of the shape's own: an option that comes twice is refused.
    return [(shape, small, limit) for shape, _, limit in chosen]


def colocate(run):
    args = run.args
    known = [shape for shape, _, _ in COLOCATED]
    chosen = [row for row in COLOCATED if row[0] in (args.shapes or known)]
    chosen += [(shape, [], 120) for shape in args.shapes or [] if shape not in known]
    for batch in args.batches or [COLOCATED_BATCH]:
        for shape, options, limit in chosen:
            measure_turns(run, shape, batch, options, limit if args.device == "cuda" else 120)


def measure_turns(run, shape, batch, options, limit):
    args, name = run.args, f"{shape} batch {batch}"
    if run.clock.is_over():
        run.add("colocate", name, "left out", detail="the time was over")
        return
    folder = BUNDLE / "workspace/configs/models" / shape
    model = ["--model", folder] if folder.exists() else ["--model-shape", shape]
    command = [BUNDLE / "bin/aha", "bench", "colocate", *model, "--device", args.device, "--json", *options]
    command += ["--batch", batch, "--group", min(batch, 8), "--new-tokens", args.new_tokens]
    command += ["--prompt-tokens", args.prompt_tokens] if args.device == "cuda" else ["--prompt-tokens", 16, "--steps", 1]
    command += ["--micro-batch-tokens", 16384] if args.device == "cuda" else []
    ended = run.command(f"colocate-{shape}-{batch}", command, limit)
    measured = last_json(ended.output) if ended.succeeded else None
    if measured is None:
        # A result as well, and no failure of the rest.
        full = "out of memory" in ended.output.lower()
        status = "late" if ended.timed_out else "does not fit" if full else "failed"
        run.add("colocate", name, status, detail=ended.verdict(), log=tail(ended.output, 15))
        return
    parts = [f"{part} {measured[part + '_seconds']:.3f} s" for part in ("generate", "train", "push")]
    options = " ".join(map(str, options))
    run.add("colocate", name, "ok", shape=shape, options=options, measured=measured, detail=", ".join(parts))


def known_peak(gpu):
    return next((peak for name, peak in PEAK_TFLOPS if name in gpu), None)


def decode(run):
    args = run.args
    for engine, shape, batch in measurements(args):
        name = f"{engine} {shape} batch {batch}"
        folder = run.out / "shapes" / shape
        if run.clock.is_over():
            run.add("decode", name, "left out", detail="the time was over")
            continue
        if not (folder / "config.json").exists():
            run.command(f"shape-{shape}", [BUNDLE / "bin/aha", "bench", "shape", shape, folder], 30)
        sizes = ["--batch", batch, "--prompt-tokens", args.prompt_tokens, "--new-tokens", args.new_tokens]
        if engine == "aha":
            command = [BUNDLE / "bin/aha", "bench", "decode", "--model", folder, "--load-format", "dummy", "--json"]
            command += ["--bandwidth-gbs", args.bandwidth_gbs] if args.bandwidth_gbs else []
        elif not host.has_module("transformers"):
            run.add("decode", name, "skipped", detail="transformers is not installed")
            continue
        else:
            dtype = "bfloat16" if args.device == "cuda" else "float32"
            command = [sys.executable, BUNDLE / "hf_decode.py", folder, "--dummy", "--dtype", dtype]
        ended = run.command(name.replace(" ", "-"), [*command, "--device", args.device, *sizes], MEASURE_LIMIT)
        measured = last_json(ended.output) if ended.succeeded else None
        if measured is None:
            status = "late" if ended.timed_out else "failed"
            run.add("decode", name, status, detail=ended.verdict(), log=tail(ended.output, 15))
            continue
        detail = f"{measured['tokens_per_second']:.0f} tokens/s"
        run.add("decode", name, "ok", engine=engine, shape=shape, batch=batch, measured=measured, detail=detail)


def measurements(args):
    """The chosen ones in order of importance; shapes and batches beyond the list come after it."""
    known = [(shape, batch) for _, shape, batch in MEASUREMENTS]
    asked = [(shape, batch) for shape in args.shapes or [] for batch in args.batches or []]
    more = [(engine, *pair) for pair in asked if pair not in known for engine in ("aha", "hf")]
    chosen = [(engine, shape, batch) for engine, shape, batch in MEASUREMENTS
              if shape in (args.shapes or [shape]) and batch in (args.batches or [batch])]
    return chosen + more


def last_json(output):
    for line in reversed(output.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return None


def main():
    args = arguments()
    host.unpack(BUNDLE)
    problem = host.problem(BUNDLE)
    if problem:
        print(f"this machine cannot run the bundle: {problem}", file=sys.stderr)
        return 2
    if (args.out / "parts.jsonl").exists():
        print(f"{args.out} holds the results of another run: name another --out", file=sys.stderr)
        return 2
    run = Run(args)
    working = run.check("machine", "aha starts", [BUNDLE / "bin/aha", "--version"], 60)
    if working["status"] != "ok":
        print(working["log"], file=sys.stderr)
        return 2
    for part in (kernels, parity, grpo, train, colocate, decode):
        if part.__name__ in args.skip:
            run.add(part.__name__, "all", "skipped", detail="by --skip", correctness=part in (kernels, parity, grpo))
            continue
        try:
            part(run)
        except Exception as error:  # The other parts must come to their turn.
            run.add(part.__name__, "the script", "failed", correctness=True, detail=f"{type(error).__name__}: {error}")
    print(f"{run.out / 'result.md'} has the results", flush=True)
    return 0 if all(row["status"] == "ok" for row in run.rows if row.get("correctness")) else 1


if __name__ == "__main__":
    sys.exit(main())

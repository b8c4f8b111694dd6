"""Writes optimizers.json: learning rates, code books and updates as transformers, bitsandbytes and torch compute them.

Run: python3 make_optimizers.py   (torch 2.11 and transformers 5 on a CPU; the same versions give the same file)

- schedules: `transformers.get_scheduler` over whole runs.
- muon: `torch.optim.Muon` on matrices of three shapes.
- code_books: the published formula of bitsandbytes' `create_dynamic_map` (arXiv 2110.02861, section 2.2), written out.
- adamw_8bit: block-wise AdamW with moments in those code books, written out in NumPy from the paper's equations with
  bitsandbytes' rules (256 elements a block, nearest value, a negative first moment stays negative). Its gradients are a
  formula, `gradient` below, so that they need not be stored.
"""
import json
import os

import numpy as np
import torch
import transformers

STEPS = 12


def schedules():
    cases = []
    for kind in ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_min_lr"]:
        for warmup in [0, 1, 3, STEPS]:
            if kind == "constant" and warmup:
                continue  # transformers' constant knows no warm-up
            parameter = torch.nn.Parameter(torch.zeros(1))
            optimizer = torch.optim.SGD([parameter], lr=0.3)
            extra = {"min_lr_rate": 0.1} if kind == "cosine_with_min_lr" else {}
            scheduler = transformers.get_scheduler(
                kind, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS, scheduler_specific_kwargs=extra
            )
            rates = []
            for _ in range(STEPS):
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                scheduler.step()
            cases.append({"kind": kind, "warmup_steps": warmup, "rates": rates})
    return cases


def muon():
    cases = []
    generator = torch.Generator().manual_seed(3)
    for rows, columns in [(24, 10), (8, 20), (12, 12)]:
        for adjust in ["original", "match_rms_adamw"]:
            parameter = torch.nn.Parameter(torch.randn(rows, columns, generator=generator).round(decimals=3))
            gradients = [torch.randn(rows, columns, generator=generator).round(decimals=3) for _ in range(3)]
            case = {"rows": rows, "columns": columns, "adjust_lr": adjust, "lr": 0.02, "weight_decay": 0.1,
                    "initial": parameter.flatten().tolist(), "gradients": [g.flatten().tolist() for g in gradients]}
            optimizer = torch.optim.Muon([parameter], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
            for gradient in gradients:
                parameter.grad = gradient
                optimizer.step()
            case["expect"] = parameter.detach().flatten().tolist()
            cases.append(rounded(case))
    return cases


def dynamic_map(signed):
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2 ** (exponent if signed else exponent + 1)
        bounds = torch.linspace(0.1, 1, count + 1)
        means = (bounds[:-1] + bounds[1:]) / 2.0
        values += (10 ** (exponent - 6) * means).tolist()
        if signed:
            values += (-(10 ** (exponent - 6)) * means).tolist()
    assert len(values) == 256
    return np.sort(np.array(values, dtype=np.float32))


def gradient(index, step):
    """Elements of one block differ by powers of ten."""
    return np.sin(0.37 * index + 1.7 * step) * 10.0 ** -(index % 5)


class Moment:
    def __init__(self, numel, signed):
        self.book, self.signed = dynamic_map(signed).astype(np.float64), signed
        self.value = np.zeros(numel)

    def store(self, value):
        blocks = value.reshape(-1, 256)
        absmax = np.abs(blocks).max(1, keepdims=True)
        share = blocks / np.where(absmax == 0, 1, absmax)
        codes = np.abs(share[..., None] - self.book).argmin(-1)
        if self.signed:
            codes -= (share < 0) & (self.book[codes] == 0)
        self.value = (self.book[codes] * absmax).reshape(-1)


def adamw_8bit():
    numel, lr, beta1, beta2, eps, decay = 4096 + 512, 1e-2, 0.9, 0.95, 1e-8, 0.1
    index = np.arange(numel)
    parameter = np.cos(0.11 * index)
    first, second = Moment(numel, True), Moment(numel, False)
    for step in range(1, 6):
        g = gradient(index, step)
        m = beta1 * first.value + (1 - beta1) * g
        v = beta2 * second.value + (1 - beta2) * g * g
        parameter = parameter * (1 - lr * decay)
        parameter = parameter - lr * (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + eps)
        first.store(m)
        second.store(v)
    return {"numel": numel, "steps": 5, "stride": 7, "lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps,
            "weight_decay": decay, "expect": [round(float(x), 7) for x in parameter[::7]]}


def rounded(case):
    short = lambda value: [round(x, 7) for x in value] if isinstance(value[0], float) else [short(x) for x in value]
    return {key: short(value) if isinstance(value, list) else value for key, value in case.items()}


golden = {
    "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    "schedules": {"learning_rate": 0.3, "max_steps": STEPS, "min_lr_rate": 0.1, "cases": schedules()},
    "muon": muon(),
    "code_books": {"signed": dynamic_map(True).tolist(), "unsigned": dynamic_map(False).tolist()},
    "adamw_8bit": adamw_8bit(),
}
path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "optimizers.json")
with open(path, "w") as file:
    json.dump(golden, file)
    file.write("\n")

"""Writes objectives.json: losses, gradients and advantages as TRL computes them, on fixed tensors.

Run: python3 make_objectives.py   (TRL 1.16 and torch on a CPU; the same versions give the same file)

The loss comes from TRL's own `GRPOTrainer._compute_loss`, called on a stub in place of a trainer, which answers with the
log-probs and entropies of fixed logits. Advantages and the ratio between trainer and generator come from the lines of
`_generate_and_score_completions` themselves (RLOO's from `RLOOTrainer`), cut out of TRL's source and executed, and the
soft overlong punishment from `trl.rewards`. What TRL does not have is written out here: `transcribed` (GSPO-token,
arXiv 2507.18071, equation 14, as in TRL 0.22; the KL estimators k1 and k2) and `whitened` (verl's `masked_whiten`).
Options are named as in aha's `train` section; `use_kl_in_reward`, with which the loss has no KL term, is what TRL's
`RLOOTrainer` does.
"""
import inspect
import json
import math
import os
import textwrap
from collections import defaultdict
from types import SimpleNamespace

import torch
import trl
from trl.rewards import get_soft_overlong_punishment
from trl.trainer import grpo_trainer, rloo_trainer
from trl.trainer.grpo_trainer import GRPOTrainer

assert trl.__version__.startswith("1.16."), trl.__version__

VOCAB, GROUP, LONGEST = 7, 3, 6
LENGTHS = [4, 6, 2, 5, 1, 6, 3, 6, 4]
TRUNCATED = [length == LONGEST for length in LENGTHS]
SCORES = [[1, 0, 1, 0, 0, 1, 1, 1, 1], [0.2, 1, 0, 0, 0.7, 0.3, 0.5, 0.5, 0.5]]
SCORE_WEIGHTS = [1.0, 0.5]
B, T = len(LENGTHS), LONGEST

generator = torch.Generator().manual_seed(1)
LOGITS = (torch.randn(B, T, VOCAB, generator=generator) * 1.5).round(decimals=3)
TOKENS = torch.randint(0, VOCAB, (B, T), generator=generator)
MASK = torch.tensor([[int(t < length) for t in range(T)] for length in LENGTHS])
LOGPROBS = LOGITS.log_softmax(-1).gather(-1, TOKENS.unsqueeze(-1)).squeeze(-1)
noise = lambda scale: torch.randn(B, T, generator=generator) * scale
OLD, REFERENCE = LOGPROBS + noise(0.3), LOGPROBS + noise(0.5)
SAMPLED = OLD + noise(0.25)

DEFAULTS = dict(
    loss_type="dapo", bnpo_batch_size=3, importance_sampling_level="token", epsilon=0.2, epsilon_high=None, delta=None,
    sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
    vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
    beta=0.0, kl_estimator="k3", use_bias_correction_kl=False, advantage_estimator="grpo", scale_rewards="group",
    normalize_advantages=False, multi_objective_aggregation="sum_then_normalize", soft_punish_cache=0,
    soft_punish_weight=1.0, mask_truncated_completions=False, rollout_importance_sampling_correction=False,
    rollout_importance_sampling_mode="sequence_mask", rollout_importance_sampling_clip_max=3.0,
    rollout_importance_sampling_clip_min=None, off_policy_mask_threshold=None, top_entropy_quantile=1.0,
    entropy_coef=0.0, use_kl_in_reward=False, use_adaptive_entropy=False, entropy_coef_min=0.0, entropy_coef_max=1.0,
    entropy_coef_delta=0.005, entropy_target=0.2,
)


def lines(function, first, last):
    """The lines of a function from the one that begins with `first` up to the one that begins with `last`."""
    source = inspect.getsource(function).splitlines()
    start = next(i for i, line in enumerate(source) if line.strip().startswith(first))
    stop = next(i for i, line in enumerate(source) if i > start and line.strip().startswith(last))
    return textwrap.dedent("\n".join(source[start:stop]))


class World:
    """An accelerate.Accelerator of one process."""

    num_processes, sync_gradients = 1, True

    def gather(self, value):
        return value

    def reduce(self, value, reduction):
        return value

    def pad_across_processes(self, value, dim, pad_index):
        return value


def scored(options):
    scores, weights = [list(map(float, s)) for s in SCORES], list(SCORE_WEIGHTS)
    if options["soft_punish_cache"]:
        punish = get_soft_overlong_punishment(LONGEST, options["soft_punish_cache"])
        scores.append(punish([[0] * length for length in LENGTHS]))
        weights.append(options["soft_punish_weight"])
    return torch.tensor(scores).T.contiguous(), torch.tensor(weights)


def whitened(values, mask):
    values = values.unsqueeze(1).expand(mask.shape)
    mean = (values * mask).sum() / mask.sum()
    variance = ((values - mean) ** 2 * mask).sum() / mask.sum() * mask.sum() / (mask.sum() - 1)
    return ((values - mean) * torch.rsqrt(variance + 1e-8))[:, 0]


def advantages_of(options, mask):
    """`[B]`."""
    scores, weights = scored(options)
    stub = SimpleNamespace(
        multi_objective_aggregation=options["multi_objective_aggregation"], scale_rewards=options["scale_rewards"],
        reward_weights=weights, reward_funcs=list(range(len(weights))),
        reward_clip_range=None, beta=options["beta"] if options["use_kl_in_reward"] else 0.0, normalize_advantages=options["normalize_advantages"],
    )
    names = dict(
        self=stub, torch=torch, nanstd=grpo_trainer.nanstd, rewards_per_func=scores, num_generations=GROUP,
        device=torch.device("cpu"), unscorable_mask=torch.zeros(B, dtype=torch.bool), completion_mask=mask,
        old_per_token_logps=OLD, ref_per_token_logps=REFERENCE, gather=lambda value: value,
    )
    estimator = options["advantage_estimator"]
    if estimator == "grpo":
        source = lines(
            GRPOTrainer._generate_and_score_completions, "if self.multi_objective_aggregation", "# Unscorable completions"
        )
        exec(source, names)
        return names["advantages"]
    if estimator == "rloo":
        source = lines(
            rloo_trainer.RLOOTrainer._generate_and_score_completions, "# Apply weights to each reward",
            "# Unscorable completions",
        )
        exec(source, names)
        return names["advantages"]
    rewards = (scores * weights).sum(1)
    if estimator == "reinforce_plus_plus_baseline":
        rewards = rewards - rewards.view(-1, GROUP).mean(1).repeat_interleave(GROUP)
    return whitened(rewards, mask)


def correction(options, old, mask):
    """TRL's `importance_sampling_ratio`, `[B, T]` or `[B, 1]`."""
    stub = SimpleNamespace(
        vllm_importance_sampling_mode=options["rollout_importance_sampling_mode"],
        vllm_importance_sampling_clip_max=options["rollout_importance_sampling_clip_max"],
        vllm_importance_sampling_clip_min=options["rollout_importance_sampling_clip_min"],
    )
    names = dict(
        self=stub, torch=torch, math=math, completion_mask=mask, tool_mask=None, old_per_token_logps=old,
        sampling_per_token_logps=SAMPLED,
    )
    source = lines(
        GRPOTrainer._generate_and_score_completions, "mask = completion_mask if tool_mask is None",
        "# Compute the per-token log probabilities for the reference",
    )
    exec(source, names)
    return names["vllm_importance_sampling_ratio"]


def trainer(options, logprobs, entropies, num_parts, steps_per_generation, last_entropy):
    """What `_compute_loss` needs of a trainer."""
    epsilon_high = options["epsilon_high"]
    names = ("delta", "use_bias_correction_kl", "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos",
             "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "entropy_target", "entropy_coef_min",
             "entropy_coef_max", "entropy_coef_delta")
    stub = SimpleNamespace(
        args=SimpleNamespace(steps_per_generation=steps_per_generation, **{name: options[name] for name in names}),
        accelerator=World(), model=SimpleNamespace(training=True), aux_loss_enabled=False,
        top_entropy_quantile=options["top_entropy_quantile"],
        off_policy_mask_threshold=options["off_policy_mask_threshold"],
        importance_sampling_level=options["importance_sampling_level"],
        beta=0.0 if options["use_kl_in_reward"] else options["beta"],
        loss_type=options["loss_type"], epsilon_low=options["epsilon"],
        epsilon_high=options["epsilon"] if epsilon_high is None else epsilon_high,
        use_vllm=True, vllm_importance_sampling_correction=options["rollout_importance_sampling_correction"],
        current_gradient_accumulation_steps=num_parts, max_completion_length=LONGEST,
        _entropy_bonus_enabled=options["entropy_coef"] != 0.0 or options["use_adaptive_entropy"],
        entropy_coef=options["entropy_coef"], use_adaptive_entropy=options["use_adaptive_entropy"],
        _last_world_entropy=math.inf if last_entropy is None else last_entropy, _entropy_window_stats=None,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs, entropies, None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask, get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )
    stub.get_high_entropy_mask = lambda *args: GRPOTrainer.get_high_entropy_mask(stub, *args)
    return stub


def transcribed(options, advantages, logprobs, old, mask):
    """The mean over tokens, as loss_type dapo has it."""
    log_ratio = logprobs - old
    if options["importance_sampling_level"] == "sequence_token":
        sequence = (log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
        log_ratio = logprobs - logprobs.detach() + sequence.detach().unsqueeze(-1)
    ratio = torch.exp(log_ratio)
    clipped = torch.clamp(ratio, 1 - options["epsilon"], 1 + options["epsilon"])
    loss = -torch.min(ratio * advantages.unsqueeze(1), clipped * advantages.unsqueeze(1))
    kl = torch.zeros(())
    if options["beta"] > 0:
        difference = logprobs - REFERENCE
        kl = difference if options["kl_estimator"] == "k1" else difference.square() / 2
        if options["use_bias_correction_kl"]:
            kl = kl * ratio
        loss = loss + options["beta"] * kl
    return (loss * mask).sum() / mask.sum(), (kl * mask).sum() / mask.sum()


def case(name, moved=True, members=None, steps_per_generation=1, last_entropy=None, **options):
    """One record; `members` are the completions of this update, all without."""
    unknown = set(options) - set(DEFAULTS)
    assert not unknown, unknown
    full = {**DEFAULTS, **options}
    mask = MASK * torch.tensor([[int(not (full["mask_truncated_completions"] and cut))] for cut in TRUNCATED])
    advantages = advantages_of(full, mask)
    logits = LOGITS.clone().requires_grad_()
    all_logprobs = logits.log_softmax(-1)
    logprobs = all_logprobs.gather(-1, TOKENS.unsqueeze(-1)).squeeze(-1)
    logprobs.retain_grad()
    entropies = -(all_logprobs.exp() * all_logprobs).sum(-1)
    old = OLD if moved else LOGPROBS
    rows = list(range(B)) if members is None else members
    if full["importance_sampling_level"] == "sequence_token" or full["kl_estimator"] != "k3":
        loss, kl = transcribed(full, advantages, logprobs, old, mask)
        metrics = {"kl": [kl.item()]}
    else:
        size = full["bnpo_batch_size"] if full["loss_type"] == "bnpo" else len(rows)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        loss, metrics = 0.0, {}
        for part in parts:
            stub = trainer(full, logprobs[part], entropies[part], len(parts), steps_per_generation, last_entropy)
            inputs = dict(
                prompt_ids=torch.zeros(len(part), 1, dtype=torch.long), prompt_mask=torch.ones(len(part), 1),
                completion_ids=TOKENS[part], completion_mask=mask[part], advantages=advantages[part],
                num_items_in_batch=mask.sum(), ref_per_token_logps=REFERENCE[part],
                sampling_per_token_logps=SAMPLED[part],
            )
            if moved:
                inputs["old_per_token_logps"] = old[part]
            if full["rollout_importance_sampling_correction"]:
                inputs["importance_sampling_ratio"] = correction(full, old, mask)[part]
            loss = loss + GRPOTrainer._compute_loss(stub, None, inputs)
            metrics = stub._metrics["train"]
    loss.backward()
    # TRL masks by zeros where aha leaves tokens out.
    assert not (logprobs.grad * (1 - mask)).any()
    cut = lambda values: [values[i, : LENGTHS[i]].flatten().tolist() for i in range(B)]
    record = {
        "name": name, "moved": moved, "train": {**options, "steps_per_generation": steps_per_generation},
        "members": members, "loss": loss.item(), "advantages": advantages.tolist(),
        "d_logprobs": cut(logprobs.grad),
    }
    if full["loss_type"] == "bnpo":
        record["train"]["bnpo_batch_size"] = full["bnpo_batch_size"]
    if full["use_adaptive_entropy"]:
        record |= {"last_entropy": last_entropy, "entropy_coef": stub.entropy_coef}
    if full["entropy_coef"]:
        record["d_logits"] = cut(logits.grad)
    # The sign of an advantage that is 0 but for rounding decides what counts as clipped.
    clear = not ((advantages != 0) & (advantages.abs() < 1e-6)).any()
    token_level = full["importance_sampling_level"] == "token"
    for ours, theirs in [("kl", "kl"), ("clipped_low", "clip_ratio/low_mean"), ("clipped_high", "clip_ratio/high_mean")]:
        # Counts of sequences are not counts of tokens.
        if theirs in metrics and (token_level and clear or ours == "kl") and full["loss_type"] != "bnpo":
            record[ours] = metrics[theirs][0]
    return record


def cases():
    for loss_type in ["grpo", "dr_grpo", "dapo", "bnpo", "sapo", "vespo", "luspo", "cispo"]:
        options = {"loss_type": loss_type}
        if loss_type == "cispo":
            options["epsilon_high"] = 1.1
        if loss_type == "luspo":
            options["importance_sampling_level"] = "sequence"
        yield case(loss_type, **options)
        yield case(f"{loss_type} on policy", moved=False, **options)
        yield case(f"{loss_type} with kl and truncated completions masked", beta=0.04, mask_truncated_completions=True,
                   **options)
        if loss_type != "bnpo":
            yield case(f"{loss_type}, one of three updates", members=[7, 0, 4], steps_per_generation=3, **options)
        modes = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
        for mode in modes[:2] if loss_type == "vespo" else modes:
            bounds = dict(rollout_importance_sampling_clip_max=1.2)
            if mode != "sequence_truncate" and loss_type != "vespo":
                bounds["rollout_importance_sampling_clip_min"] = 0.8
            yield case(f"{loss_type}, {mode}", rollout_importance_sampling_correction=True,
                       rollout_importance_sampling_mode=mode, **bounds, **options)
    yield case("correction on policy", moved=False, rollout_importance_sampling_correction=True)
    yield case("clip higher", epsilon=0.1, epsilon_high=0.28)
    yield case("two-sided clip", epsilon=0.1, epsilon_high=0.15, delta=1.2)
    yield case("gspo", loss_type="grpo", importance_sampling_level="sequence", epsilon=0.05, epsilon_high=0.1)
    yield case("gspo on policy", moved=False, loss_type="grpo", importance_sampling_level="sequence")
    yield case("gspo of dapo with bias-corrected kl", importance_sampling_level="sequence", beta=0.1,
               use_bias_correction_kl=True)
    yield case("gspo with high entropies and delta", loss_type="grpo", importance_sampling_level="sequence",
               top_entropy_quantile=0.4, delta=1.25)
    yield case("gspo-token", importance_sampling_level="sequence_token", epsilon=0.05)
    yield case("k3 with bias correction", beta=0.1, use_bias_correction_kl=True)
    yield case("k3 with bias correction on policy", moved=False, beta=0.1, use_bias_correction_kl=True)
    yield case("k2", beta=0.1, kl_estimator="k2")
    yield case("k1 with bias correction", beta=0.1, kl_estimator="k1", use_bias_correction_kl=True)
    yield case("off-policy mask", off_policy_mask_threshold=0.02)
    yield case("off-policy mask, corrected", off_policy_mask_threshold=0.05, rollout_importance_sampling_correction=True)
    for share in [0.2, 0.55, 0.0]:
        yield case(f"top entropy {share}", top_entropy_quantile=share, beta=0.02)
    yield case("entropy bonus", entropy_coef=0.03)
    yield case("entropy bonus of gspo", loss_type="grpo", importance_sampling_level="sequence", entropy_coef=0.03)
    yield case("entropy bonus of the high entropies, truncated masked", entropy_coef=0.03, top_entropy_quantile=0.3,
               mask_truncated_completions=True)
    adaptive = dict(use_adaptive_entropy=True, entropy_coef=0.03, entropy_coef_max=0.033)
    for last_entropy in [None, 1.0, 1.3]:
        # The mean entropy lies between 1.1 and 1.4 nats.
        for target in [1.1, 1.4]:
            yield case(f"adaptive entropy bonus, {last_entropy} before, target {target}", last_entropy=last_entropy,
                       entropy_target=target, **adaptive)
    yield case("adaptive entropy bonus at its bound", last_entropy=1.0, entropy_target=1.1, entropy_coef_min=0.029,
               **adaptive)
    yield case("adaptive entropy bonus of the high entropies", last_entropy=1.0, entropy_target=1.4,
               top_entropy_quantile=0.3, **adaptive)
    for scale in ["group", "batch", "none"]:
        yield case(f"scaled by {scale}", scale_rewards=scale)
    yield case("normalize then sum", multi_objective_aggregation="normalize_then_sum")
    yield case("soft overlong punishment", soft_punish_cache=4, soft_punish_weight=0.7)
    yield case("rloo", advantage_estimator="rloo")
    yield case("rloo, normalized", advantage_estimator="rloo", normalize_advantages=True)
    yield case("rloo, kl in the reward", advantage_estimator="rloo", beta=0.3, use_kl_in_reward=True)
    yield case("rloo, kl in the reward, normalized, truncated masked", advantage_estimator="rloo", beta=0.3,
               use_kl_in_reward=True, normalize_advantages=True, mask_truncated_completions=True)
    yield case("reinforce++", advantage_estimator="reinforce_plus_plus")
    yield case("reinforce++ baseline", advantage_estimator="reinforce_plus_plus_baseline")
    yield case("reinforce++ baseline, truncated masked", advantage_estimator="reinforce_plus_plus_baseline",
               mask_truncated_completions=True)


def rounded(value):
    if isinstance(value, float):
        assert math.isfinite(value)
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value


def per_completion(values):
    return [values[i, : LENGTHS[i]].tolist() for i in range(B)]


def main():
    batch = {
        "vocab_size": VOCAB, "num_generations": GROUP, "max_completion_length": LONGEST, "scores": SCORES,
        "score_weights": SCORE_WEIGHTS, "truncated": TRUNCATED, "tokens": per_completion(TOKENS),
        "logits": [LOGITS[i, : LENGTHS[i]].flatten().tolist() for i in range(B)],
        "old_logprobs": per_completion(OLD), "sampled_logprobs": per_completion(SAMPLED),
        "reference_logprobs": per_completion(REFERENCE),
    }
    record = rounded({"trl": trl.__version__, "torch": torch.__version__, "batch": batch, "cases": list(cases())})
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "objectives.json")
    with open(path, "w") as file:
        file.write("{\n")
        file.write(f'"trl": "{trl.__version__}", "torch": "{torch.__version__}",\n')
        file.write(f'"batch": {json.dumps(record["batch"])},\n"cases": [\n')
        file.write(",\n".join(json.dumps(case) for case in record["cases"]))
        file.write("\n]}\n")
    print(f"{len(record['cases'])} cases in {path}")


main()

"""
Objectives without a reference: pure functions of the log-probs and lengths of whole responses.

    python train.py config/simpo_demo.py --loss=simpo --gamma=1.0

Each takes (B,) tensors, log pi(y|x) summed over a response's tokens and lengths in tokens, and
returns (losses, chosen_rewards, rejected_rewards), each (B,), as in dpo.py.
"""
import torch
import torch.nn.functional as F

from dpo import bernoulli_nll


def simpo_loss(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths,
               beta=2.0, gamma=0.5, label_smoothing=0.0, p=None, sft_weight=0.0):
    """Simple preference optimisation (Meng et al. 2024, arXiv:2405.14734, equation 6):

        loss = -log sigma(beta/|y_w| log pi(y_w|x) - beta/|y_l| log pi(y_l|x) - gamma)

    The reward is beta times the mean log-prob of a response's tokens. `gamma` is the target
    margin, in units of reward (the paper searches 0.3 to 1.6). `label_smoothing` and `p` are as
    in dpo_loss and weigh the two sides of z = r_w - r_l - gamma, as in the authors' code: the
    margin stays on chosen's side. `sft_weight` weighs the mean negative log-likelihood of chosen
    (the paper's appendix).
    """
    chosen_rewards = beta * policy_chosen_logps / chosen_lengths
    rejected_rewards = beta * policy_rejected_logps / rejected_lengths
    losses = bernoulli_nll(chosen_rewards - rejected_rewards - gamma, label_smoothing, p)
    if sft_weight:
        losses = losses - sft_weight * policy_chosen_logps / chosen_lengths
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def cpo_loss(policy_chosen_logps, policy_rejected_logps, beta=0.1, sft_weight=1.0):
    """Contrastive preference optimisation (Xu et al. 2024, arXiv:2401.08417, equation 5): DPO
    with a uniform reference, anchored by the likelihood of chosen:

        loss = -log sigma(beta log pi(y_w|x) - beta log pi(y_l|x)) - sft_weight log pi(y_w|x)
    """
    chosen_rewards, rejected_rewards = beta * policy_chosen_logps, beta * policy_rejected_logps
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards) - sft_weight * policy_chosen_logps
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def orpo_loss(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths,
              beta=0.1):
    """Odds-ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691, equations 6 and 7):

        loss = -log P(y_w) - beta log sigma(log odds(y_w) - log odds(y_l)),    odds = P / (1 - P)

    with log P(y) = 1/|y| log pi(y|x). beta is the paper's lambda.
    """
    chosen = policy_chosen_logps / chosen_lengths
    rejected = policy_rejected_logps / rejected_lengths
    # log(1 - P) = log(-expm1(log P)) keeps its digits near P = 1; at P = 1 it would be infinite
    c, r = chosen.clamp(max=-1e-7), rejected.clamp(max=-1e-7)
    log_odds_ratio = (c - r) - (torch.log(-torch.expm1(c)) - torch.log(-torch.expm1(r)))
    losses = -chosen - beta * F.logsigmoid(log_odds_ratio)
    return losses, beta * chosen.detach(), beta * rejected.detach()


def slic_loss(policy_chosen_logps, policy_rejected_logps, delta=1.0, sft_weight=1.0):
    """Sequence likelihood calibration, SLiC-HF (Zhao et al. 2023, arXiv:2305.10425, equation 1):

        loss = max(0, delta - log pi(y_w|x) + log pi(y_l|x)) - sft_weight log pi(y_w|x)

    The paper regularises towards the SFT target; here, as in SimPO's comparison, towards chosen.
    """
    hinge = F.relu(delta - policy_chosen_logps + policy_rejected_logps)
    losses = hinge - sft_weight * policy_chosen_logps
    return losses, policy_chosen_logps.detach(), policy_rejected_logps.detach()


def rrhf_loss(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths,
              sft_weight=1.0):
    """Rank responses to align human feedback (Yuan et al. 2023, arXiv:2304.05302, equations 2-4),
    on pairs:

        loss = max(0, 1/|y_l| log pi(y_l|x) - 1/|y_w| log pi(y_w|x)) - sft_weight log pi(y_w|x)
    """
    chosen = policy_chosen_logps / chosen_lengths
    rejected = policy_rejected_logps / rejected_lengths
    losses = F.relu(rejected - chosen) - sft_weight * policy_chosen_logps
    return losses, chosen.detach(), rejected.detach()


def sft_loss(policy_chosen_logps):
    """Supervised fine-tuning on chosen: loss = -log pi(y_w|x), in nats per response. No rewards:
    None.

    A sum over tokens, not a mean: with a mean, tokens of short responses weigh more, and the
    model learns to end too soon.
    """
    return -policy_chosen_logps, None, None

"""
Objectives that need no reference: pure functions of log-probabilities, summed over each response's tokens,
and of the responses' lengths in tokens.

All take (B,) tensors and return (losses, chosen_rewards, rejected_rewards), each (B,), as dpo.py's do.

    python train.py config/simpo_demo.py --loss=simpo --gamma=1.0
"""
import torch
import torch.nn.functional as F

from dpo import preference_loss


def simpo_loss(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths,
               beta=2.0, gamma=0.5, label_smoothing=0.0, p=None, sft_weight=0.0):
    """Simple preference optimisation (Meng et al. 2024, arXiv:2405.14734, equation 6):

        loss = -log sigma(beta/|y_w| log pi(y_w|x) - beta/|y_l| log pi(y_l|x) - gamma)

    The reward is beta times the mean log-prob of a response's tokens; `gamma` is the margin, in units of
    reward, by which chosen is asked to win (the paper searches 0.3 to 1.6). `label_smoothing` and `p` are as
    in dpo_loss; they weigh the two sides of z = r_w - r_l - gamma, so the margin stays on chosen's
    side, as in the authors' code. `sft_weight` weighs chosen's mean negative log-likelihood (their appendix).
    """
    chosen_rewards = beta * policy_chosen_logps / chosen_lengths
    rejected_rewards = beta * policy_rejected_logps / rejected_lengths
    losses = preference_loss(chosen_rewards - rejected_rewards - gamma, label_smoothing, p)
    if sft_weight:
        losses = losses - sft_weight * policy_chosen_logps / chosen_lengths
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def cpo_loss(policy_chosen_logps, policy_rejected_logps, beta=0.1, sft_weight=1.0):
    """Contrastive preference optimisation (Xu et al. 2024, arXiv:2401.08417, equation 5): DPO with a uniform
    reference, held in place by the chosen response's likelihood,

        loss = -log sigma(beta log pi(y_w|x) - beta log pi(y_l|x)) - sft_weight log pi(y_w|x)
    """
    chosen_rewards, rejected_rewards = beta * policy_chosen_logps, beta * policy_rejected_logps
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards) - sft_weight * policy_chosen_logps
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def orpo_loss(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths, beta=0.1):
    """Odds-ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691, equations 6 and 7):

        loss = -log P(y_w) - beta log sigma(log odds(y_w) - log odds(y_l)),    log P(y) = 1/|y| log pi(y|x),
        odds = P / (1 - P)

    beta is the paper's lambda.
    """
    chosen, rejected = policy_chosen_logps / chosen_lengths, policy_rejected_logps / rejected_lengths
    # log(1 - P) as log(-expm1(log P)), which keeps its digits near P = 1; at 1 itself it would be infinite
    c, r = chosen.clamp(max=-1e-7), rejected.clamp(max=-1e-7)
    odds = (c - r) - (torch.log(-torch.expm1(c)) - torch.log(-torch.expm1(r)))
    losses = -chosen - beta * F.logsigmoid(odds)
    return losses, beta * chosen.detach(), beta * rejected.detach()


def slic_loss(policy_chosen_logps, policy_rejected_logps, delta=1.0, sft_weight=1.0):
    """Sequence likelihood calibration, SLiC-HF (Zhao et al. 2023, arXiv:2305.10425, equation 1):

        loss = max(0, delta - log pi(y_w|x) + log pi(y_l|x)) - sft_weight log pi(y_w|x)

    The paper regularises towards a model's own SFT target; here, as in SimPO's comparison, towards chosen.
    """
    losses = F.relu(delta - policy_chosen_logps + policy_rejected_logps) - sft_weight * policy_chosen_logps
    return losses, policy_chosen_logps.detach(), policy_rejected_logps.detach()


def rrhf_loss(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths, sft_weight=1.0):
    """Rank responses to align human feedback (Yuan et al. 2023, arXiv:2304.05302, equations 2-4), on pairs:

        loss = max(0, 1/|y_l| log pi(y_l|x) - 1/|y_w| log pi(y_w|x)) - sft_weight log pi(y_w|x)
    """
    chosen, rejected = policy_chosen_logps / chosen_lengths, policy_rejected_logps / rejected_lengths
    losses = F.relu(rejected - chosen) - sft_weight * policy_chosen_logps
    return losses, chosen.detach(), rejected.detach()


def sft_loss(policy_chosen_logps):
    """Supervised fine-tuning on the chosen responses: loss = -log pi(y_w|x), in nats per response. How a
    reference is made where there is none. A sum, not a mean over the tokens: with 1/|y| for each, short
    ones would weigh more, and the model would learn to end too soon. No comparison, so no rewards: None."""
    return -policy_chosen_logps, None, None

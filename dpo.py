"""
Objectives with a frozen reference: pure functions of log-probabilities, summed over each response's tokens.

Every function takes (B,) tensors and returns (losses, chosen_rewards, rejected_rewards), each (B,). The
losses carry the gradient; the rewards are for the eye, detached. train.py passes what a signature names.
Left out: averaging over the batch (train.py divides by the pairs in the whole step), knowledge of tokens.

    python train.py config/dpo_demo.py --loss=dpo --beta=0.5
"""
import torch.nn.functional as F


def preference_loss(z, label_smoothing=0.0, p=None):
    """-[q log sigma(z) + (1 - q) log sigma(-z)]: the Bradley-Terry model's negative log-likelihood.

    z (B,) is the log-odds that chosen is the better, q the probability that it is: `p` (1 where None), and
    with smoothing eps, q = (1 - eps) p + eps (1 - p): with probability eps a label was flipped.
    """
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f'label_smoothing {label_smoothing} is not between 0 and 0.5')
    q = 1.0 if p is None else p
    q = (1 - label_smoothing) * q + label_smoothing * (1 - q)
    return -q * F.logsigmoid(z) - (1 - q) * F.logsigmoid(-z)


def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
             beta=0.1, label_smoothing=0.0, p=None):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7):

        loss = -log sigma(beta log pi/pi_ref(y_w|x) - beta log pi/pi_ref(y_l|x))

    With r = beta log pi/pi_ref the implicit reward (equation 5; the partition function cancels in the
    difference), it is the Bradley-Terry likelihood of the pair. `label_smoothing` makes it conservative DPO
    (Mitchell 2023); `p`, (B,), is the probability that chosen is the better, 1 where None. beta, the weight
    of the KL constraint, is in units of reward per nat.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = preference_loss(chosen_rewards - rejected_rewards, label_smoothing, p)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def robust_dpo_loss(policy_chosen_logps, policy_rejected_logps,
                    reference_chosen_logps, reference_rejected_logps, beta=0.1, label_smoothing=0.1):
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409, equation 12), for a share eps of flipped labels,

        loss = [(1 - eps) l(y_w, y_l) - eps l(y_l, y_w)] / (1 - 2 eps),  l = DPO's loss, eps = label_smoothing

    Unbiased: in expectation over the flips it is DPO's loss on clean labels; a single pair's may be negative.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f'label_smoothing {label_smoothing} is not between 0 and 0.5')
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    z, eps = chosen_rewards - rejected_rewards, label_smoothing
    losses = ((1 - eps) * -F.logsigmoid(z) + eps * F.logsigmoid(-z)) / (1 - 2 * eps)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def ipo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
             chosen_lengths, rejected_lengths, beta=0.1, length_average=False):
    """Identity preference optimisation (Azar et al. 2023, arXiv:2310.12036, equation 17):

        loss = (h - 1/(2 beta))^2,    h = log pi/pi_ref(y_w|x) - log pi/pi_ref(y_l|x)

    beta is the paper's tau. The paper's log-probs are sums, and so are these; TRL divides each by its
    response's length, and so does `length_average`. The rewards shown are beta log pi/pi_ref.
    """
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    if length_average:
        chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
    losses = (chosen - rejected - 1 / (2 * beta)) ** 2
    return losses, beta * chosen.detach(), beta * rejected.detach()


def rdpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
              chosen_lengths, rejected_lengths, beta=0.1, alpha=0.01):
    """Length-regularised DPO, R-DPO (Park et al. 2024, arXiv:2403.19159, equation 9):

        loss = -log sigma(beta log pi/pi_ref(y_w|x) - beta log pi/pi_ref(y_l|x) + alpha |y_w| - alpha |y_l|)

    It is DPO for the reward r(x,y) - alpha |y|: alpha, in reward per token, is what a longer answer costs.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards + alpha * (chosen_lengths - rejected_lengths))
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def kto_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
             beta=0.1, reference_point=0.0):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306, equation 8) on pairs:

        loss = [1 - sigma(r_w - z)] + [1 - sigma(z - r_l)],    r = beta log pi/pi_ref

    with both weights 1. In the paper z is beta KL(pi||pi_ref), estimated over a batch and clamped at 0 from
    below; here it is the constant `reference_point`: with an estimate a pair's loss would depend on others.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = (reference_point - chosen_rewards).sigmoid() + (rejected_rewards - reference_point).sigmoid()
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def plackett_luce_loss(policy_logps, reference_logps, beta=0.1):
    """DPO on rankings, (B, K) tensors with the best first (Rafailov et al. 2023, appendix A.3, equation 20):

        loss = -sum_k log [exp(r_k) / sum_{j >= k} exp(r_j)],    r = beta log pi/pi_ref

    DPO is the case K = 2. The rewards returned are those of the best and of the worst.
    """
    rewards = beta * (policy_logps - reference_logps)
    left = rewards.flip(1).logcumsumexp(1).flip(1)      # log of the sum over those not yet placed
    losses = (left - rewards).sum(1)
    return losses, rewards[:, 0].detach(), rewards[:, -1].detach()

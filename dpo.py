"""
Objectives with a frozen reference: pure functions of the log-probs of whole responses.

    python train.py config/dpo_demo.py --loss=dpo --beta=0.5

Each takes (B,) tensors, log pi(y|x) summed over a response's tokens, and returns (losses,
chosen_rewards, rejected_rewards), each (B,). The losses carry the gradient; rewards are detached:
for logging only. `--loss=x` calls `x_loss`; parameters that the training loop does not supply are
its options. Left out: the mean over the batch, which train.py takes over all pairs of a step.
"""
import torch.nn.functional as F


def bernoulli_nll(z, label_smoothing=0.0, p=None):
    """Negative log-likelihood of the Bradley-Terry model: -[q log sigma(z) + (1 - q) log
    sigma(-z)], (B,).

    z (B,) is the log-odds that chosen is better, and q the probability that it is: `p`, (B,), or
    1. `label_smoothing` eps is the probability that a label was flipped: q = (1 - eps) p + eps (1
    - p). Raises ValueError where eps is not between 0 and 0.5.
    """
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f'label_smoothing {label_smoothing} is not between 0 and 0.5')
    q = 1.0 if p is None else p
    q = (1 - label_smoothing) * q + label_smoothing * (1 - q)
    return -q * F.logsigmoid(z) - (1 - q) * F.logsigmoid(-z)


def dpo_loss(policy_chosen_logps, policy_rejected_logps,
             reference_chosen_logps, reference_rejected_logps,
             beta=0.1, label_smoothing=0.0, p=None):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7):

        loss = -log sigma(beta log pi/pi_ref(y_w|x) - beta log pi/pi_ref(y_l|x))

    This is the Bradley-Terry likelihood of the pair under the implicit reward r = beta log
    pi/pi_ref (equation 5): the partition function cancels in the difference. beta is the weight
    of the KL constraint. `label_smoothing` gives conservative DPO (Mitchell 2023); `p`, (B,), is
    the probability that chosen is better, 1 where None.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = bernoulli_nll(chosen_rewards - rejected_rewards, label_smoothing, p)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def robust_dpo_loss(policy_chosen_logps, policy_rejected_logps,
                    reference_chosen_logps, reference_rejected_logps,
                    beta=0.1, label_smoothing=0.1):
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409, equation 12), eps = label_smoothing <
    0.5:

        loss = [(1 - eps) l(y_w, y_l) - eps l(y_l, y_w)] / (1 - 2 eps),    l = DPO's loss

    Its expectation over labels flipped with probability eps is DPO's loss on clean labels. One
    pair's loss may be negative. Raises ValueError where eps is out of range.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f'label_smoothing {label_smoothing} is not between 0 and 0.5 (excluded)')
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    z, eps = chosen_rewards - rejected_rewards, label_smoothing
    losses = ((1 - eps) * -F.logsigmoid(z) + eps * F.logsigmoid(-z)) / (1 - 2 * eps)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def ipo_loss(policy_chosen_logps, policy_rejected_logps,
             reference_chosen_logps, reference_rejected_logps,
             chosen_lengths, rejected_lengths, beta=0.1, length_average=False):
    """Identity preference optimisation (Azar et al. 2023, arXiv:2310.12036, equation 17):

        loss = (h - 1/(2 beta))^2,    h = log pi/pi_ref(y_w|x) - log pi/pi_ref(y_l|x)

    beta is the paper's tau. The paper sums log-probs; `length_average` divides each log-ratio by
    its response's length, as TRL does.
    """
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    if length_average:
        chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
    losses = (chosen - rejected - 1 / (2 * beta)) ** 2
    return losses, beta * chosen.detach(), beta * rejected.detach()


def rdpo_loss(policy_chosen_logps, policy_rejected_logps,
              reference_chosen_logps, reference_rejected_logps,
              chosen_lengths, rejected_lengths, beta=0.1, alpha=0.01):
    """Length-regularised DPO, R-DPO (Park et al. 2024, arXiv:2403.19159, equation 9):

        loss = -log sigma(beta log pi/pi_ref(y_w|x) - beta log pi/pi_ref(y_l|x) + alpha |y_w| -
        alpha |y_l|)

    DPO for the reward r(x,y) - alpha |y|: alpha is the price of a token, in units of reward.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    z = chosen_rewards - rejected_rewards + alpha * (chosen_lengths - rejected_lengths)
    return -F.logsigmoid(z), chosen_rewards.detach(), rejected_rewards.detach()


def kto_loss(policy_chosen_logps, policy_rejected_logps,
             reference_chosen_logps, reference_rejected_logps, beta=0.1, reference_point=0.0):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306, equation 8) on
    pairs:

        loss = [1 - sigma(r_w - z)] + [1 - sigma(z - r_l)],    r = beta log pi/pi_ref

    with both weights 1. The paper estimates z = beta KL(pi||pi_ref) from the batch; here it is
    the constant `reference_point`, so that a pair's loss does not depend on its neighbours.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    z = reference_point
    losses = (z - chosen_rewards).sigmoid() + (rejected_rewards - z).sigmoid()
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def plackett_luce_loss(policy_logps, reference_logps, beta=0.1):
    """DPO on rankings, (B, K) tensors, best first (Rafailov et al. 2023, appendix A.3, equation
    20):

        loss = -sum_k log [exp(r_k) / sum_{j >= k} exp(r_j)],    r = beta log pi/pi_ref

    K = 2 is DPO. The rewards returned are those of the best and of the worst response.
    """
    rewards = beta * (policy_logps - reference_logps)
    remaining = rewards.flip(1).logcumsumexp(1).flip(1)    # log-sum over responses not ranked yet
    losses = (remaining - rewards).sum(1)
    return losses, rewards[:, 0].detach(), rewards[:, -1].detach()

"""
Objectives that need a frozen reference: pure functions of log-probabilities, summed over each response's tokens.

Every function takes (B,) tensors and returns (losses, chosen_rewards, rejected_rewards), each (B,). The losses carry
the gradient; the rewards are for the eye, and detached. train.py passes an objective whatever its signature names.
Left out: any averaging over the batch (train.py divides by the pairs in the whole step) and any knowledge of tokens.

    python train.py config/dpo_demo.py --loss=dpo --beta=0.5
"""
import torch.nn.functional as F


def preference_loss(z, label_smoothing=0.0, p=None):
    """-[q log sigma(z) + (1 - q) log sigma(-z)]: the Bradley-Terry model's negative log-likelihood.

    z (B,) is the log-odds that chosen is the better, q the probability that it is: `p` (1 where None), and with
    smoothing eps, q = (1 - eps) p + eps (1 - p): with probability eps a label was flipped.
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

    With r = beta log pi/pi_ref the implicit reward (equation 5; the partition function cancels in the difference),
    it is the Bradley-Terry likelihood of the pair. `label_smoothing` makes it conservative DPO (Mitchell 2023);
    `p`, (B,), is the probability that chosen is the better, 1 where None. beta, the weight of the KL constraint, is
    in units of reward per nat.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = preference_loss(chosen_rewards - rejected_rewards, label_smoothing, p)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()

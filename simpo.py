"""
Objectives that need no reference: pure functions of log-probabilities, summed over each response's tokens, and of the
responses' lengths in tokens.

Every function takes (B,) tensors and returns (losses, chosen_rewards, rejected_rewards), each (B,), as dpo.py's do.

    python train.py config/simpo_demo.py --loss=simpo --gamma=1.0
"""
from dpo import preference_loss


def simpo_loss(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths,
               beta=2.0, gamma=0.5, label_smoothing=0.0, p=None):
    """Simple preference optimisation (Meng et al. 2024, arXiv:2405.14734, equation 6):

        loss = -log sigma(beta/|y_w| log pi(y_w|x) - beta/|y_l| log pi(y_l|x) - gamma)

    The reward is beta times the mean log-prob of a response's tokens; `gamma` is the margin, in units of reward, by
    which chosen is asked to win (the paper tunes gamma/beta, 0.3 to 0.5 for the most part). `label_smoothing` and `p`
    as in dpo_loss; they weigh the two sides of z = r_w - r_l - gamma, so the margin stays on chosen's side, as in the
    authors' code.
    """
    chosen_rewards = beta * policy_chosen_logps / chosen_lengths
    rejected_rewards = beta * policy_rejected_logps / rejected_lengths
    losses = preference_loss(chosen_rewards - rejected_rewards - gamma, label_smoothing, p)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def sft_loss(policy_chosen_logps):
    """Supervised fine-tuning on the chosen responses: loss = -log pi(y_w|x), in nats per response. How a reference is
    made where there is none. A sum, not a mean over the tokens: with one 1/|y| per response, short ones would weigh
    more, and the model would learn to end too soon. No comparison, so no rewards: None stands for them."""
    return -policy_chosen_logps, None, None

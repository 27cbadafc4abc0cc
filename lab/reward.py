"""
A Bradley-Terry reward model: the GPT with a scalar head, trained by train.py like any policy.

    python train.py config/reward_demo.py     # its `model_class` and `loss` are those of this file
    python -m lab.judge score out/reward_demo pairs.jsonl      # what to do with it: lab/judge.py

token_logps is 0 at each token of a response but the last, where the reward stands. Their sum over a
response, which the training loop passes to the objective as its log-prob, is then the reward.
So `logps` in a reward model's logs are rewards, too. Known rewards can be fitted directly:
reward_distillation_loss, with the margins of lab/labels.py.
Left out: centred rewards (the loss sees only differences), reward models of other architectures.
"""
import torch.nn as nn

from dpo import bernoulli_nll
from model import GPT


class RewardModel(GPT):
    """r(x, y) = w h, with h the output at the last token of y, which has attended to all before."""

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(config.n_embd, 1, bias=False)
        nn.init.zeros_(self.head.weight)     # all rewards 0, so the first loss is log 2

    def token_logps(self, batch):            # -> (N,), in the order of batch.targets
        x = self.batch_hidden(batch)                                                # (T, d)
        last = batch.lengths.flatten().cumsum(0) - 1         # (B*K,): which of the N tokens end one
        at = (batch.branch > 0).nonzero()[:, 0][last]        # (B*K,): where those are in the batch
        rewards = (x[at].float() * self.head.weight[0]).sum(-1)                     # not in bf16
        return rewards.new_zeros(len(batch.targets)).index_copy(0, last, rewards)


def reward_loss(policy_chosen_logps, policy_rejected_logps,
                gamma=0.0, label_smoothing=0.0, p=None, margin=None):
    """The Bradley-Terry reward model (Rafailov et al. 2023, arXiv:2305.18290, equation 2). The
    "log-probs" are rewards r(x, y), (B,), as RewardModel.token_logps gives them:

        loss = -log sigma(r(x, y_w) - r(x, y_l) - m),    m = gamma + margin

    `margin`, (B,), says by how much a pair's chosen is better (Touvron et al. 2023,
    arXiv:2307.09288, equation 2); gamma is one margin for all. `p` and `label_smoothing` are as in
    dpo_loss.
    """
    margin = gamma if margin is None else gamma + margin
    z = policy_chosen_logps - policy_rejected_logps - margin
    losses = bernoulli_nll(z, label_smoothing, p)
    return losses, policy_chosen_logps.detach(), policy_rejected_logps.detach()


def reward_distillation_loss(policy_chosen_logps, policy_rejected_logps,
                             reference_chosen_logps, reference_rejected_logps, margin, beta=1.0):
    """Reward distillation (Fisch et al. 2024, arXiv:2405.19316), the regression of REBEL (Gao et
    al. 2024, arXiv:2404.16767) with eta = 1/beta:

        loss = [beta log pi/pi_ref(y_w|x) - beta log pi/pi_ref(y_l|x) - (r(x, y_w) - r(x, y_l))]^2

    DPO's implicit reward, fitted to known rewards by least squares; log Z(x) cancels in the
    difference. `margin`, (B,), is r(x, y_w) - r(x, y_l), below 0 where rejected scored higher.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = (chosen_rewards - rejected_rewards - margin) ** 2
    return losses, chosen_rewards.detach(), rejected_rewards.detach()

# DPO in the built-in world (lab/films.py): no download, no GPU, and the right answer is known.
#
#   python train.py config/dpo_demo.py
#
# Data: 6,000 pairs that the base model samples, labelled by Bradley-Terry on the gold reward.
# Expect about 3 minutes on two cores, 1 of them here and the rest for the base model; an accuracy
# of 0.7 to 0.82 (labels are noisy: the gold reward itself agrees with 75% of them), and nine
# tenths of the gain that the optimum has at the policy's KL.
from lab import films

out_dir = 'out/dpo_demo'
overwrite = True
init_from = films.base_model()
dataset = films.pairs(init_from)
at_end = films.report

tokenizer = 'byte'
max_length = 112
max_prompt_length = 48
val_fraction = 0.05

loss = 'dpo'
beta = 1.0      # the gold reward is in units of 1, so the optimum is pi_ref exp(r)

batch_size = 32
learning_rate = 1e-4
warmup_iters = 10
epochs = 1.0

eval_interval = 60
compile = False

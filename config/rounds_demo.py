# DPO on-policy in the built-in world (lab/rounds.py): three times, the newest policy answers 2,000
# prompts twice, the judge labels the answers, and DPO goes on from there.
#
#   python -m lab.rounds config/rounds_demo.py
#   python -m lab.rounds config/rounds_demo.py --judge=out/reward_demo    # a reward model's labels
#   python -m lab.rounds config/rounds_demo.py --judge=mine.py:kindness   # yours
#
# Data: the prompts of config/sft_demo.py's reviews, no download. Expect two to three minutes on two
# cores where the base model is there, and close to nine tenths of the gain that the optimum has at
# the policy's KL: no more than one round reaches with as many pairs.
from lab import films

out_dir = 'out/rounds_demo'
overwrite = True
init_from = films.base_model()
dataset = films.texts()
at_end = films.report

rounds = 3
judge = 'gold'
labels = 'sample'
round_pairs = 2000

tokenizer = 'byte'
max_length = 112
max_prompt_length = 48
val_fraction = 0.05

loss = 'dpo'
beta = 1.0

batch_size = 32
learning_rate = 1e-4
warmup_iters = 10
epochs = 1.0

eval_interval = 60
compile = False

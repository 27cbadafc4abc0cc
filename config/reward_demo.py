# A Bradley-Terry reward model in the built-in world (lab/reward.py), on the pairs of
# config/dpo_demo.py.
#
#   python train.py config/reward_demo.py
#   python -m lab.judge score out/reward_demo pairs.jsonl
#   python -m lab.rounds config/rounds_demo.py --judge=out/reward_demo
#
# Data: the same 6,000 pairs, made where they are missing. Expect an accuracy of about 0.7 after one
# to two minutes on two cores; the gold reward itself agrees with 75% of these labels.
from lab import films
from lab.reward import RewardModel as model_class, reward_loss as loss

out_dir = 'out/reward_demo'
overwrite = True
init_from = films.base_model()
dataset = films.pairs(init_from)

tokenizer = 'byte'
max_length = 112
max_prompt_length = 48
val_fraction = 0.05

batch_size = 32
learning_rate = 3e-4
warmup_iters = 10
epochs = 2.0

eval_interval = 60
compile = False

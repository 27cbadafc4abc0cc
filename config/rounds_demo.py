# DPO on-policy, on the demo: three times, the newest policy answers 2,000 prompts twice, the judge labels the answers,
# and DPO goes on from there. The reference stays the base model (reward.py).
#
#   python train.py config/rounds_demo.py
#   python train.py config/rounds_demo.py --judge=out/reward_demo    # a reward model's labels instead of the gold ones
#   python train.py config/rounds_demo.py --judge=mine.py:kindness   # yours: kindness(prompt, [response, ...]) -> numbers
#
# Data: the prompts of config/dpo_demo.py's pairs; nothing to download. Expect two to three minutes on two cores, and
# nine tenths of the optimum's gain, as one round gets from as many pairs (LOG.md).

out_dir = 'out/rounds_demo'
overwrite = True
init_from = 'out/sft_demo'
init_config = 'config/sft_demo.py'

rounds = 3
judge = 'gold'
labels = 'sample'
round_pairs = 2000

dataset = 'demo'
tokenizer = 'byte'
max_length = 112
max_prompt_length = 48

loss = 'dpo'
beta = 1.0

batch_size = 32
learning_rate = 1e-4
warmup_iters = 10
epochs = 1.0

eval_interval = 60
compile = False

# The Bradley-Terry reward model that DPO does without, on the demo's pairs (reward.py).
#
#   python train.py config/reward_demo.py
#   python reward.py score out/reward_demo pairs.jsonl      # or as the judge of config/rounds_demo.py
#
# Data: as config/dpo_demo.py's, made where it is missing; nothing to download. Expect a validation accuracy near the
# gold reward's own, 75% of the labels, after a minute or two on two cores.

out_dir = 'out/reward_demo'
overwrite = True
init_from = 'out/sft_demo'
init_config = 'config/sft_demo.py'

dataset = 'demo'
tokenizer = 'byte'
max_length = 112
max_prompt_length = 48

loss = 'reward'

batch_size = 32
learning_rate = 3e-4
warmup_iters = 10
epochs = 1.0

eval_interval = 60
compile = False

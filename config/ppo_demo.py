# PPO in the built-in world (lab/ppo.py): what DPO replaces.
#
#   python -m lab.ppo config/ppo_demo.py
#   python -m lab.ppo config/ppo_demo.py --judge=out/reward_demo --out_dir=out/ppo_reward_demo
#
# Data: prompts drawn from the grammar, no labels; the second command needs config/reward_demo.py's
# run. Expect three to five minutes on one core, a KL of 0.85 and 96% of the gain that the optimum
# has there; with the reward model a KL of 0.32 and 89%.
from lab import films

out_dir = 'out/ppo_demo'
overwrite = True
init_from = films.base_model()
draw_prompts = films.draw_prompts
watch = 'gold'
at_end = films.report

tokenizer = 'byte'
max_new_tokens = 80

beta = 1.0              # as in config/dpo_demo.py: the optimum is pi_ref exp(r)
responses = 512
max_iters = 40
epochs = 2
batch_size = 64
learning_rate = 1e-4
warmup_iters = 3

eval_interval = 5

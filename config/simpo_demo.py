# SimPO in the built-in world (lab/films.py): as config/dpo_demo.py, without a reference in the
# loss.
#
#   python train.py config/simpo_demo.py
#
# Data: the same 6,000 pairs. Expect 80% of the optimum's gain at a KL of 0.2, in a minute or two
# on two cores where the base model is there. beta and gamma are within what the paper searched
# (Meng et al. 2024: beta 2.0 to 2.5, gamma 0.3 to 1.6).
from lab import films

out_dir = 'out/simpo_demo'
overwrite = True
init_from = films.base_model()
dataset = films.pairs(init_from)
at_end = films.report

tokenizer = 'byte'
max_length = 112
max_prompt_length = 48
val_fraction = 0.05

loss = 'simpo'
beta = 2.0
gamma = 1.0

batch_size = 32
learning_rate = 1e-5    # only a small rate keeps SimPO near its start: at 1e-4 its words fall apart
warmup_iters = 10
epochs = 1.0

eval_interval = 60
compile = False

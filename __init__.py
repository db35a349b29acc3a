"""rilq: stream a checkpoint into 2 bits and win the accuracy back.

After `import rilq`, `transformers.AutoModelForCausalLM.from_pretrained` loads native checkpoints.
"""

from rilq.formats.registration import install

__version__ = "0.1.0"

install()

"""The main job: a tiny GRPO run on real verl, vLLM and Ray, once per arm, without a GPU."""

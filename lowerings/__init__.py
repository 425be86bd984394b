"""From rewritten graphs to code: what each operator becomes on each target."""

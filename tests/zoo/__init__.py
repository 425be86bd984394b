"""The model zoo: real architectures with tiny random weights, measured site by site."""

"""What every backend needs: taking a model, calling conventions, dynamic shapes, products with integer weights."""

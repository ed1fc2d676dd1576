"""`axolotl spin doctor`: what can be known about a run before GPU hours are spent."""

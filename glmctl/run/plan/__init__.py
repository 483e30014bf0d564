"""What a recipe needs of devices before anybody rents them: memory, communication, time. Imports no torch."""

"""What a recipe takes of a card's memory: predicted from shapes alone, measured for real, and made to fit."""

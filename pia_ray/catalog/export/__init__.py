"""An output's videos copied under names of the user's, with a feed of them."""

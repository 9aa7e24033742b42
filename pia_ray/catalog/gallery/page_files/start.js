drawSort();
$("bar").hidden = false;
setAutoplay(autoplay);
apply();
drawReviewButtons();

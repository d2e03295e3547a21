"use strict";
const narrow = window.innerWidth < 600;
for (const plot of document.querySelectorAll(".plot")) {
  const { data, layout } = JSON.parse(document.getElementById(plot.dataset.source).textContent);
  if (narrow) {
    layout.font.size = 11;
    layout.height = 340;
  }
  Plotly.newPlot(plot, data, layout, {
    responsive: true,
    displaylogo: false,
    displayModeBar: narrow ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d"],
    doubleClick: "reset",
  });
}

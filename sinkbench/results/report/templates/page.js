"use strict";
const narrow = window.innerWidth < 600;
for (const plot of document.querySelectorAll(".plot")) {
  const { data, layout } = JSON.parse(document.getElementById(plot.dataset.source).textContent);
  const names = data.filter((trace) => trace.showlegend !== false).length;
  layout.height = (narrow ? 340 : 400) + Math.max(0, names - 6) * (narrow ? 33 : 12); // room for the legend
  if (narrow) {
    layout.font.size = 11;
  }
  Plotly.newPlot(plot, data, layout, {
    responsive: true,
    displaylogo: false,
    displayModeBar: narrow ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d"],
    doubleClick: "reset",
  });
}

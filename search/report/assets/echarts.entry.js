import { init, use } from "echarts/core";
import { HeatmapChart, LineChart, ParallelChart, ScatterChart } from "echarts/charts";
import { AriaComponent, GridComponent, LegendComponent, ParallelComponent, TooltipComponent, VisualMapComponent } from "echarts/components";
import { SVGRenderer } from "echarts/renderers";
use([HeatmapChart, LineChart, ParallelChart, ScatterChart, AriaComponent, GridComponent, LegendComponent, ParallelComponent, TooltipComponent, VisualMapComponent, SVGRenderer]);
window.charts = { init };
